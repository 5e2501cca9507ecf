"""Broken configurations and data sets, each with what its refusal must say; none gets as far as a model's weights."""

from pathlib import Path

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.utils.dict import DictDefault
from conftest import ROOT, SMOKE, smoke_config

from axolotl_mopo.errors import ConfigError, DataError

BROKEN = Path(__file__).parent / "broken"
CONFIGS = sorted((BROKEN / "configs").iterdir())
DATA = sorted(path for path in (BROKEN / "data").iterdir() if path.name != "expected.yaml")
EXPECTED = yaml.safe_load((BROKEN / "data" / "expected.yaml").read_text(encoding="utf-8"))
METHODS = {
    "modpo": {"objective": "better", "weights": {"better": 1}},
    "amopo": {"dimensions": ["helpfulness"]},
}


def expectations(config):
    """The texts of a configuration's first lines."""
    lines = config.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("# expect: ") for line in lines if line.startswith("# expect: ")]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_broken_configuration_is_refused(config):
    with pytest.raises(ConfigError) as caught:
        load_cfg(str(config))
    for text in expectations(config):
        assert text in str(caught.value)


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name)
def test_a_broken_data_set_is_refused(path, tmp_path):
    entry = dict(EXPECTED[path.name])
    method, kind, texts = entry.pop("method"), entry.pop("type"), entry.pop("expect")
    name = str(path.relative_to(ROOT))
    datasets = [{"path": name, "type": f"axolotl_mopo.{kind}", **entry}]
    cfg = smoke_config(method, tmp_path, datasets=datasets, test_datasets=None, **{method: METHODS[method]})
    with pytest.raises((ConfigError, DataError)) as caught:
        validated = load_cfg(DictDefault(cfg))
        validated.dataset_num_proc = None  # in this process; a worker's error would be the same
        load_preference_datasets(cfg=validated)
    for text in ["datasets[0]", name, *texts]:
        assert text in str(caught.value)


def test_every_broken_file_says_what_is_expected_of_it():
    assert all(expectations(config) for config in CONFIGS)
    assert {path.name for path in DATA} == set(EXPECTED)
    assert all(entry["expect"] for entry in EXPECTED.values())
    assert len(CONFIGS) + len(DATA) >= 180


def test_there_are_no_weights_that_could_be_loaded():
    assert not any(path.suffix in (".safetensors", ".bin") for path in SMOKE.rglob("*"))

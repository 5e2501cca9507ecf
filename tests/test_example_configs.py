"""Every example config passes the host's validation as it stands."""

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from conftest import ROOT

CONFIGS = [path for path in sorted((ROOT / "example_configs").glob("*.yaml")) if "sweep" not in path.name]
ON_GPUS = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


def test_there_are_two_smoke_configs_and_two_recipes():
    assert [path.stem for path in CONFIGS] == [
        "qwen2.5-7b-amopo-zero3",
        "qwen2.5-7b-modpo-lora",
        "smoke-amopo",
        "smoke-modpo",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_example_passes_the_hosts_validation(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = DictDefault(yaml.safe_load(path.read_text()))
    method = cfg.rl
    prepare_plugins(cfg)
    validated = validate_config(cfg, capabilities=ON_GPUS, env_capabilities={"torch_version": "2.13.0"})
    assert validated[method]
    assert validated.trainer_cls.lower() == f"axolotl_mopo.trainers.{method}trainer"
    unknown = set(yaml.safe_load(path.read_text())) - set(validated)
    assert not unknown, f"the host dropped {unknown}"

"""README, guides and references: their YAML is valid, their links lead somewhere, generated pages are up to date."""

import json
import re
import shutil

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from conftest import ROOT, SMOKE, host_trainer, smoke_config
from transformers import MixtralConfig
from warm import python

from axolotl_mopo.config import METHODS, parse_settings
from axolotl_mopo.training.metrics import METRICS
from axolotl_mopo.version import __version__

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "example_configs/README.md")]
PAGES = [page for page in PAGES if page.exists()] + sorted((ROOT / "docs").rglob("*.md"))


def blocks():
    """Every YAML block that is a mapping, under a name that says where it is."""
    for page in PAGES:
        for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)):
            content = yaml.safe_load(text)
            if isinstance(content, dict):
                yield pytest.param(content, id=f"{page.relative_to(ROOT)}-{number}")


YAML = list(blocks())
COMPLETE = [block for block in YAML if "base_model" in block.values[0]]


@pytest.mark.parametrize("content", COMPLETE)
def test_a_complete_yaml_passes_axolotls_validation(content):
    assert {"base_model", "datasets", "output_dir", "learning_rate", "adapter"} <= set(content)
    cfg = DictDefault(content)
    prepare_plugins(cfg)
    validated = validate_config(cfg)
    assert validated.trainer_cls.lower() == "axolotl_mopo.training.{0}.{0}trainer".format(content["rl"])
    unknown = set(content) - set(validated)
    assert not unknown, f"Axolotl dropped {unknown}"


def test_the_readme_has_a_complete_yaml_for_each_method():
    methods = [block.values[0]["rl"] for block in COMPLETE if block.id.startswith("README.md")]
    assert methods == ["modpo", "amopo"]


@pytest.mark.parametrize("content", YAML)
def test_a_methods_block_is_valid(content):
    for method in METHODS.keys() & content.keys():
        parse_settings(METHODS[method], content[method], method)


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page):
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} is not there"
        assert linked.is_relative_to(ROOT), f"{target} is outside the repository"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def test_generated_pages_are_up_to_date():
    """In a process of its own, where no other test has entered data sets or methods into the tables."""
    done = python(ROOT / "docs" / "generate.py", "--check")
    assert done.returncode == 0, done.stderr[-2000:]


TWO_OBJECTIVES = {
    "modpo": {
        "objective": "overall",
        "weights": {"overall": 0.5, "correctness": 0.3, "brevity": 0.2},
        "margins": {"correctness": {"source": "column"}, "brevity": {"source": "length", "normalize": "std"}},
    },
    "amopo": {"dimensions": ["helpfulness", "correctness"]},
}
PLACES = {"margin": ["correctness", "brevity"], "dimension": ["integrated", "helpfulness", "correctness"]}
AXOLOTLS = re.compile(
    r"(train_)?loss|grad_norm|learning_rate|epoch|step|ppl|memory/.*|tokens/.*|.*runtime|.*_per_second.*|total_flos"
)


@pytest.fixture
def mixture(tmp_path):
    """The smoke model's tokenizer with the configuration of a tiny mixture of experts."""
    folder = tmp_path / "mixture"
    shutil.copytree(SMOKE / "model", folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    known = json.loads((folder / "config.json").read_text())
    ids = {
        name: known[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if name in known
    }
    MixtralConfig(**shape, **ids, num_key_value_heads=2, num_local_experts=4).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("method", ["modpo", "amopo"])
def test_the_table_of_metrics_is_what_a_run_logs(method, mixture, tmp_path):
    """Of a mixture of experts that skips bad losses, so that every metric has a reason to be there."""
    block = {**TWO_OBJECTIVES[method], "on_bad_loss": "skip"}
    steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "micro_batch_size": 2}
    cfg = smoke_config(method, tmp_path, base_model=mixture, **{method: block}, **steps)
    cfg["datasets"][0]["split"], cfg["test_datasets"][0]["split"] = "train[:16]", "train[:4]"
    trainer = host_trainer(cfg)
    trainer.train()
    told = {
        metric.name.replace(f"<{place}>", name)
        for metric in METRICS
        if method in metric.methods
        for place, names in PLACES.items()
        for name in names
        if f"<{place}>" in metric.name or "<" not in metric.name
    }
    logged = {name for entry in trainer.state.log_history for name in entry if not AXOLOTLS.fullmatch(name)}
    training = {name for name in logged if not name.startswith("eval_")}
    evaluation = {name.removeprefix("eval_") for name in logged - training}
    assert training == told
    assert {name for name in evaluation if not AXOLOTLS.fullmatch(name)} == told - {"skipped_steps"}


def test_every_example_is_in_the_table():
    folder = ROOT / "example_configs"
    links = re.findall(r"^\| \[.*?\]\((.*?)\)", (folder / "README.md").read_text(), re.M)
    assert sorted(links) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))


FILES = [ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff", *sorted((ROOT / ".github").rglob("*.yml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_for_other_tools_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()

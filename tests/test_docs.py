"""README, guides and references: their YAML is valid, their links lead somewhere, generated pages are up to date."""

import re

import pytest
import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from conftest import ROOT

from axolotl_mopo.config import BLOCKS, parse_block

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
    assert validated.trainer_cls.lower() == f"axolotl_mopo.trainers.{content['rl']}trainer"
    unknown = set(content) - set(validated)
    assert not unknown, f"Axolotl dropped {unknown}"


def test_the_readme_has_a_complete_yaml_for_each_method():
    methods = [block.values[0]["rl"] for block in COMPLETE if block.id.startswith("README.md")]
    assert sorted(methods) == sorted(BLOCKS)


@pytest.mark.parametrize("content", YAML)
def test_a_methods_block_is_valid(content):
    for method in BLOCKS.keys() & content.keys():
        parse_block(BLOCKS[method], content[method], method)


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

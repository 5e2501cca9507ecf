"""Imports point downwards, and naming the package or its configuration loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "axolotl_mopo"
LAYERS = (
    {"errors", "choices", "version", "log"},
    {"losses", "digests", "files", "compat"},
    {"records"},
    {"config"},
    {"logprobs"},
    {"data"},
    {"rewards"},
    {"training", "evaluation"},
    {"plugin"},
    {"commands"},
    {"cli"},
    {""},
)
"""Packages and modules of the package, those that may import others last; the package's own face is the very last."""
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(dotted):
    """The package or module directly below `axolotl_mopo` that a dotted name is of."""
    return [*dotted.split("."), ""][1]


def imported(path):
    """The modules of the package that a file imports anywhere, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: write the whole name"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "axolotl_mopo")


def upward(path, package=PACKAGE):
    """The imports of a file that its layer does not allow."""
    own = part_of(".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"))
    for name, line in imported(path):
        other = part_of(name)
        # What is in no layer is a name of the package's face, and what is in the own part a neighbour.
        if other in RANKS and other not in ("", own) and RANKS[other] >= RANKS[own]:
            yield f"{path.name}, line {line}: {own} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_lower_layers_only(path):
    assert list(upward(path)) == []


def test_every_module_has_a_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert parts <= set(RANKS)


@pytest.mark.parametrize(
    "line",
    [
        "from axolotl_mopo.training.metrics import MetricWindow",
        "import axolotl_mopo.rewards.text",
        "def f():\n    from axolotl_mopo import evaluation",
        "from axolotl_mopo.plugin import MOPOPlugin",
    ],
)
def test_an_import_that_runs_upwards_is_found(tmp_path, line):
    path = tmp_path / "axolotl_mopo" / "data" / "rows.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(list(upward(path, tmp_path / "axolotl_mopo"))) >= 1


@pytest.mark.parametrize("name", ["axolotl_mopo", "axolotl_mopo.config", "axolotl_mopo.rewards", "axolotl_mopo.cli"])
def test_naming_the_package_its_configuration_or_its_commands_loads_nothing_heavy(name):
    code = (
        f"import sys, {name}; heavy = {{'torch', 'transformers', 'datasets', 'axolotl', 'pandas', 'matplotlib'}}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


@pytest.mark.parametrize("name", ["axolotl_mopo.cli", "axolotl_mopo.plugin"])
def test_whoever_reads_settings_with_sources_knows_the_sources(name):
    code = (
        f"import {name}; from axolotl_mopo.config import MODPOConfig; "
        "margins = {'b': {'source': 'length'}}; MODPOConfig(objective='a', weights={'a': 1, 'b': 1}, margins=margins)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_settings_with_sources_that_nobody_has_entered_say_what_to_import():
    code = "from axolotl_mopo.config.methods import MarginColumns; MarginColumns(margins={'b': {}}, texts=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert "import axolotl_mopo.rewards before" in done.stderr

"""Every key of Axolotl's configuration has an effect or is refused: `host_keys.yaml` says which, and is checked."""

import ast
from pathlib import Path

import axolotl
import pytest
import yaml
from axolotl.utils.schemas.config import AxolotlInputConfig
from conftest import ROOT
from test_config import AMOPO, MODPO, changed, refusal

from axolotl_mopo.config.host_keys import _OTHER_METHODS_KEYS, WITHOUT_EFFECT

HOST = Path(axolotl.__file__).parent
KEYS = yaml.safe_load((Path(__file__).parent / "host_keys.yaml").read_text())
READ = {key: module for module, keys in KEYS["read"].items() for key in keys}
EXPLAINED = {key: reason for reason, keys in KEYS["explained"].items() for key in keys}
ELSEWHERE_REFUSED = {
    "context_parallel_size": 2,
    "layer_offloading": True,
    "pad_to_multiple_of": 8,
    "processor_type": "AutoProcessor",
    "sequence_parallel_degree": 2,
    "skip_prepare_dataset": True,
    "trainer_cls": "a.Trainer",
}
"""Keys that are refused with a reason of their own, and what is refused of them."""
REFUSED = {*_OTHER_METHODS_KEYS, *ELSEWHERE_REFUSED, *(key for keys in WITHOUT_EFFECT.values() for key in keys)}
OUTSIDE_THE_SCHEMA = {
    "rl_adapter_ref_model",  # Axolotl's code asks for it, though its schema drops it
    "cut_cross_entropy",  # of Axolotl's plugins
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_use_token_scaling",
}
TRACKERS = ("comet_", "hf_mlflow_", "mlflow_", "trackio_", "wandb_")
"""Axolotl makes environment variables of all keys that begin so."""


class Reads(ast.NodeVisitor):
    """Names that a module asks a configuration for, but for what it does under another `rl:` alone."""

    def __init__(self, module):
        self.names = set()
        self.visit(ast.parse(module.read_text()))

    def visit_If(self, node):
        parts = list(ast.walk(node.test))
        methods = {
            part.attr for part in parts if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "RLType"
        }
        negated = any(isinstance(part, ast.NotIn | ast.IsNot | ast.NotEq | ast.Not) for part in parts)
        others_alone = methods and "ORPO" not in methods and not negated
        for part in (node.test, *(() if others_alone else node.body), *node.orelse):
            self.visit(part)

    def visit_Attribute(self, node):
        if is_configuration(node.value):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Subscript(self, node):
        if is_configuration(node.value):
            self.add(node.slice)
        self.generic_visit(node)

    def visit_Call(self, node):
        called = ast.unparse(node.func)
        if called.endswith(".get") and is_configuration(node.func.value):
            self.add(*node.args[:1])
        if called in ("getattr", "hasattr") and is_configuration(node.args[0]):
            self.add(node.args[1])
        self.generic_visit(node)

    def visit_List(self, node):  # of names that a loop hands on
        self.add(*node.elts)
        self.generic_visit(node)

    def visit_Tuple(self, node):
        self.visit_List(node)

    def visit_Dict(self, node):
        self.add(*node.values)
        self.generic_visit(node)

    def add(self, *nodes):
        self.names |= {node.value for node in nodes if isinstance(node, ast.Constant)}


def is_configuration(node):
    return ast.unparse(node).split(".")[-1] in ("cfg", "config")


def test_every_key_of_the_host_is_read_or_refused_or_explained():
    known = {*READ, *REFUSED, *EXPLAINED}
    keys = {key for key in AxolotlInputConfig.model_fields if not key.startswith(TRACKERS)}
    assert keys - known == set(), "say in host_keys.yaml who reads it, or refuse it in config/host_keys.py"
    assert known - keys == OUTSIDE_THE_SCHEMA, "Axolotl knows it no more"
    assert len(READ) + len(REFUSED) + len(EXPLAINED) == len(known), "named twice"


@pytest.mark.parametrize("module", KEYS["read"])
def test_a_module_reads_what_it_is_said_to_read(module):
    root = ROOT if module.startswith("axolotl_mopo/") else HOST
    assert set(KEYS["read"][module]) - Reads(root / module).names == set()


@pytest.mark.parametrize("base", [AMOPO, MODPO], ids=["amopo", "modpo"])
def test_every_key_without_effect_is_refused_by_its_name(base):
    for key in sorted(REFUSED):
        text = refusal(changed(base, **{key: ELSEWHERE_REFUSED.get(key, 1)}))
        assert text.startswith(f"`{key}"), text
        assert "remove it" in text, text

"""The plugin uses only Axolotl's official hooks, and little of them."""

import copy
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import BasePlugin
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from conftest import ROOT, SMOKE, host_trainer, smoke_config
from test_config import AMOPO, MODPO

import axolotl_mopo
from axolotl_mopo import MOPOPlugin
from axolotl_mopo.compat import check_hooks, tested_range, version_advice
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.errors import ConfigError


def registered(cfg):
    cfg = DictDefault(copy.deepcopy(cfg))
    MOPOPlugin().register(cfg)
    return cfg


@pytest.mark.parametrize(("cfg", "trainer"), [(AMOPO, "amopo.AMoPOTrainer"), (MODPO, "modpo.MODPOTrainer")])
def test_register_turns_the_method_into_what_the_host_knows(cfg, trainer):
    once = registered(cfg)
    assert once["rl"] == "orpo"
    assert once["trainer_cls"] == f"axolotl_mopo.training.{trainer}"
    twice = registered(once)
    assert twice == once


def test_another_method_is_left_alone():
    cfg = DictDefault({"rl": "dpo", "datasets": [{"path": "p", "type": "chatml.intel"}]})
    before = copy.deepcopy(cfg)
    MOPOPlugin().register(cfg)
    assert cfg == before


@pytest.mark.parametrize("method", ["amopo", "modpo"])
def test_batches_are_not_made_hundreds_ahead(method, tmp_path):
    cfg = load_cfg(DictDefault(smoke_config(method, tmp_path)))
    ahead = cfg.dataloader_num_workers * cfg.dataloader_prefetch_factor
    assert (2 <= ahead <= 8, cfg.dataloader_pin_memory) == (True, True)


@pytest.mark.parametrize(
    "own", [{"dataloader_num_workers": 0}, {"dataloader_pin_memory": False}, {"dataloader_prefetch_factor": 64}]
)
def test_what_the_yaml_says_of_loading_stays(own):
    cfg = registered({**AMOPO, **own})
    assert {key: value for key, value in cfg.items() if key.startswith("dataloader_")} == own


@pytest.fixture
def stand_in_for_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_a_single_process_that_sees_several_gpus_is_refused(stand_in_for_two_gpus, monkeypatch):
    cfg = registered(AMOPO)
    with pytest.raises(ConfigError, match=r"sees 2 GPUs.* remove `--launcher python`.*CUDA_VISIBLE_DEVICES=0"):
        MOPOPlugin().pre_model_load(cfg)
    for other in ({"merge_lora": True}, {"rl": None, "inference": True}, {"amopo": None}):
        MOPOPlugin().pre_model_load(DictDefault({**cfg, **other}))
    monkeypatch.setenv("LOCAL_RANK", "0")  # as every launcher does it
    MOPOPlugin().pre_model_load(cfg)


def test_several_gpus_are_refused_before_a_model_is_loaded(stand_in_for_two_gpus, tmp_path):
    cfg = smoke_config("modpo", tmp_path, reinit_weights=None)  # whose weights are not there
    with pytest.raises(ConfigError, match="a single process sees 2 GPUs"):
        host_trainer(cfg)


def test_a_sweeps_dotted_key_reaches_the_block():
    cfg = registered({**MODPO, "modpo.weights": {"better": 0.9, "safer": 0.1}})
    assert cfg["modpo"]["weights"] == {"better": 0.9, "safer": 0.1}
    assert "modpo.weights" not in cfg


def entry_type(cfg):
    return registered(cfg)["datasets"][0]["type"]


def with_changes(base, **changes):
    cfg = copy.deepcopy(base)
    for key, value in changes.items():
        if key in ("amopo", "modpo"):
            cfg[key].update(value)
        elif key == "entry":
            cfg["datasets"][0].update(value)
        else:
            cfg[key] = value
    return cfg


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (AMOPO, {"amopo": {"dimensions": ["helpfulness"]}}),
        (AMOPO, {"amopo": {"integrated": False}}),
        (AMOPO, {"amopo": {"score_range": [0, 9]}}),
        (AMOPO, {"amopo": {"directive_position": "after"}}),
        (AMOPO, {"amopo": {"directives": {"integrated": "Mind {{ dimensions }}."}}}),
        (AMOPO, {"entry": {"score_scale": [0, 4]}}),
        (AMOPO, {"entry": {"field_prompt": "question"}}),
        (AMOPO, {"excess_length_strategy": "truncate"}),
        (AMOPO, {"tokens": ["<|new|>"]}),
        (MODPO, {"modpo": {"margins": {"safer": {"source": "length"}}}}),
        (MODPO, {"modpo": {"margins": {"safer": {"source": "column", "field": "harmless"}}}}),
    ],
)
def test_settings_that_change_the_rows_change_the_name_of_the_prepared_rows(base, changes):
    assert entry_type(base) == entry_type(copy.deepcopy(base))
    assert entry_type(with_changes(base, **changes)) != entry_type(base)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (AMOPO, {"amopo": {"beta": 1, "gamma": 0, "weighting": "uniform"}}),
        (AMOPO, {"amopo": {"layout": "padded", "max_tokens_per_pass": 4096, "logits_budget": 1}}),
        (MODPO, {"modpo": {"weights": {"better": 0.9, "safer": 0.1}, "beta": 0.5}}),
    ],
)
def test_settings_that_do_not_change_the_rows_share_them(base, changes):
    assert entry_type(with_changes(base, **changes)) == entry_type(base)


def test_the_methods_never_share_rows():
    assert entry_type(AMOPO) != entry_type(MODPO)


def test_a_bound_type_resolves_to_its_strategy():
    cfg = registered(AMOPO)
    module, name = cfg["datasets"][0]["type"].split(".")
    assert module == "axolotl_mopo"
    strategy = getattr(axolotl_mopo, name)
    (key,) = cfg["mopo_data"]
    assert strategy.keywords == {"key": key}
    assert DataSpec.model_validate(cfg["mopo_data"][key]).key == key
    assert all(callable(getattr(axolotl_mopo, name)) for name in FORMATS)
    with pytest.raises(AttributeError, match="pears"):
        _ = axolotl_mopo.pears


def test_the_hosts_schema_keeps_our_fields(monkeypatch):
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager

    cfg = DictDefault(
        {
            **copy.deepcopy(AMOPO),
            "base_model": str(SMOKE / "model"),
            "plugins": ["axolotl_mopo.MOPOPlugin"],
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "learning_rate": 1e-3,
            "output_dir": "outputs/x",
        }
    )
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", {})
    prepare_plugins(cfg)
    bound = cfg["datasets"][0]["type"]
    validated = validate_config(
        cfg,
        capabilities={"bf16": False, "n_gpu": 1, "compute_capability": None},
        env_capabilities={"torch_version": "2.13.0"},
    )
    assert validated.amopo.dimensions == ["helpfulness", "correctness"]
    assert validated.datasets[0].type == bound
    again = copy.deepcopy(validated)
    MOPOPlugin().register(again)  # as a Ray worker does, with Axolotl's defaults filled in
    assert again == validated
    arguments = PluginManager.get_instance().get_training_args(validated)
    assert set(arguments) == {"mopo", "logging_nan_inf_filter", "accelerator_config"}
    assert arguments["mopo"]["beta"] == 0.8
    assert arguments["accelerator_config"] == {"non_blocking": True}
    validated.accelerator_config = {"non_blocking": False, "even_batches": True}
    arguments = PluginManager.get_instance().get_training_args(validated)
    assert arguments["accelerator_config"] == {"non_blocking": False, "even_batches": True}
    validated.dataloader_pin_memory = False
    assert "accelerator_config" not in PluginManager.get_instance().get_training_args(validated)
    validated.group_by_length = True  # Axolotl leaves it out for preference runs
    arguments = PluginManager.get_instance().get_training_args(validated)
    assert arguments["train_sampling_strategy"] == "group_by_length"


def test_naming_the_package_imports_nothing_heavy():
    code = (
        "import sys, axolotl_mopo; "
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'pydantic'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_plugin_leaves_the_trainers_unimported():
    code = (
        "import sys, axolotl.integrations.base; before = set(sys.modules); from axolotl_mopo import MOPOPlugin; "
        "new = set(sys.modules) - before; "
        "assert not {name for name in new if name.startswith(('trl', 'axolotl.core'))}, new; "
        "assert 'axolotl_mopo.training.base' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_axolotl_outside_the_tested_range_is_told_of():
    assert version_advice("0.19.0") is version_advice("0.19.3") is None
    assert (version_advice() is None) is tested_range().contains(version("axolotl"))
    for other in ("0.18.0", "0.20.0", "1.0"):
        advice = version_advice(other)
        assert f"Axolotl {other} is installed" in advice
        assert 'pip install "axolotl<0.20,>=0.19"' in advice


def test_a_hook_that_the_host_lacks_is_named():
    class OldBase:
        def register(self, cfg):
            """The only hook of an imaginary older Axolotl."""

    check_hooks(MOPOPlugin, BasePlugin)
    with pytest.raises(
        ConfigError, match=r"does not call the plugin hooks `load_datasets`, `get_input_args`, .* run `pip"
    ):
        check_hooks(MOPOPlugin, OldBase)

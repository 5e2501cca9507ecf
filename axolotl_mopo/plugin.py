"""The Axolotl plugin: the only module that implements Axolotl's hooks."""

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import click
from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger

from axolotl_mopo.compat import check_devices, check_hooks, version_advice
from axolotl_mopo.config import (
    METHODS,
    DimensionsConfig,
    MethodConfig,
    MODPOConfig,
    attention_advice,
    check_skipping,
    checkpoint_advice,
    fold_dotted_keys,
    no_stray_block,
    read_method,
)
from axolotl_mopo.config.base_model import check_base_model
from axolotl_mopo.config.host_keys import DATA_LOADING, SUPERVISED_ARGUMENTS
from axolotl_mopo.data.entries import bind_entries
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.rewards.resolve import resolve_margins

LOG = get_logger("axolotl.mopo")

# ORPO is Axolotl's only preference path that loads no reference model and gives the trainer a model with adapters.
_AXOLOTL_RL = "orpo"


@dataclass
class MOPOTrainingArgs:
    """The field that the plugin adds to Axolotl's training arguments."""

    mopo: dict[str, Any] | None = field(default=None, metadata={"help": "Settings of the method in use."})


class MOPOPlugin(BasePlugin):
    """Adds `rl: modpo` and `rl: amopo` to Axolotl.

    Add `axolotl_mopo.MOPOPlugin` to `plugins:`. Under any other `rl:` the plugin does nothing.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check this package's part of the raw YAML and translate it for Axolotl; a second call changes nothing.

        Raises:
            ConfigError: if a setting is wrong; no model or data set is loaded before.
        """
        fold_dotted_keys(cfg)
        if _registered(cfg):
            return
        method = _method(cfg)
        if method is None:
            if not cfg.get("inference"):  # Axolotl removes `rl` for inference
                no_stray_block(cfg)
            return
        check_hooks(MOPOPlugin, BasePlugin)
        if advice := version_advice():
            LOG.warning(advice)
        block = read_method(cfg, method, _yaml_folder(cfg))
        check_base_model(cfg)
        _put_texts_of_files(cfg[method], block)
        if advice := attention_advice(cfg, method, block):
            LOG.warning(advice)
            cfg[method]["layout"] = "padded"
        if advice := checkpoint_advice(cfg):
            LOG.warning(advice)
        if isinstance(block, MODPOConfig):
            block = resolve_margins(cfg, block)
        if all(cfg.get(key) is None for key in DATA_LOADING):
            cfg.update(DATA_LOADING)
        cfg["rl"], cfg["trainer_cls"] = _AXOLOTL_RL, block.trainer
        bind_entries(cfg, block)
        if cfg.get("debug"):  # an option of the command line, which Axolotl's configuration does not keep
            cfg["mopo_debug"] = cfg.get("debug_num_examples") or 1

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> Any:
        """With `axolotl preprocess --debug`, show which tokens of the first rows are trained on.

        Axolotl does so itself for its other preference methods, but not for the one that this plugin uses.

        Returns:
            What Axolotl's own loader returns, or None to let Axolotl load the data.
        """
        if not (preprocess and _method_config(cfg) and cfg.mopo_debug):
            return None
        from axolotl.common.datasets import load_preference_datasets
        from axolotl.loaders import load_tokenizer

        from axolotl_mopo.data.shown_tokens import row_as_text

        loaded, tokenizer = load_preference_datasets(cfg=cfg), load_tokenizer(cfg)
        for number, row in enumerate(islice(loaded.train_dataset, cfg.mopo_debug)):
            text = row_as_text(tokenizer, row)
            LOG.info("Row %d of the prepared rows:\n%s", number, text if sys.stdout.isatty() else click.unstyle(text))
        return loaded

    def get_input_args(self) -> str:
        """The class of the fields that are added to Axolotl's configuration."""
        return "axolotl_mopo.config.MOPOArgs"

    def get_training_args_mixin(self) -> str:
        """The class of the field that is added to Axolotl's training arguments."""
        return "axolotl_mopo.plugin.MOPOTrainingArgs"

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Refuse to train or evaluate in a single process on several GPUs.

        Raises:
            ConfigError: if no launcher started this process and it sees several GPUs.
        """
        if _method_config(cfg) and cfg.rl and not cfg.merge_lora:
            check_devices()

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """The settings of the method for the trainer, and arguments that Axolotl leaves out for preference runs.

        Raises:
            ConfigError: if Axolotl built its argument classes without this plugin.
        """
        block = _method_config(cfg)
        if block is None:
            return {}
        check_skipping(cfg, block.on_bad_loss)  # only now Axolotl has resolved `bf16: auto`
        from axolotl.core.training_args import AxolotlORPOConfig

        if "mopo" not in {known.name for known in fields(AxolotlORPOConfig)}:
            raise ConfigError(
                "this process trained another configuration without the plugin before, so Axolotl's training "
                "arguments lack the plugin's; list `axolotl_mopo.MOPOPlugin` there too, or start another process"
            )
        arguments: dict[str, Any] = {"mopo": block.model_dump(mode="json")}
        arguments["logging_nan_inf_filter"] = False  # it hides bad losses and synchronizes the device every step
        if cfg.dataloader_pin_memory is not False:  # copy batches to the device while it computes
            arguments["accelerator_config"] = {"non_blocking": True, **(cfg.accelerator_config or {})}
        if cfg.group_by_length:
            arguments["train_sampling_strategy"] = "group_by_length"
        if cfg.load_best_model_at_end or cfg.early_stopping_patience:
            arguments["load_best_model_at_end"] = True
        return arguments | {key: cfg[key] for key in SUPERVISED_ARGUMENTS if cfg.get(key) is not None}

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: Any) -> list[Any]:
        """The callbacks that write `mopo.json` and `mopo.png` into every checkpoint folder."""
        from axolotl_mopo.training.callbacks import HistoryCallback, ManifestCallback

        block = _method_config(cfg)
        return [ManifestCallback(block, cfg.base_model, cfg.chat_template_kwargs), HistoryCallback()] if block else []

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Any) -> list[Any]:
        """The callback for early stopping, which Axolotl leaves out for preference runs."""
        from transformers import EarlyStoppingCallback

        patience = cfg.early_stopping_patience
        return [EarlyStoppingCallback(patience)] if patience and _method_config(cfg) else []

    def post_train(self, cfg: DictDefault, model: Any) -> None:
        """Write `mopo.json` next to the final model."""
        from axolotl_mopo.training.callbacks import write_manifest

        block = _method_config(cfg)
        if block and os.environ.get("RANK", "0") == "0":  # by now Axolotl has ended the process group
            write_manifest(block, cfg.base_model, Path(cfg.output_dir), cfg.chat_template_kwargs)


def _method_config(cfg: DictDefault) -> MethodConfig | None:
    """The settings of the method in use; None if it is not a method of this package."""
    return next((kind.model_validate(cfg[rl].to_dict()) for rl, kind in METHODS.items() if cfg.get(rl)), None)


def _yaml_folder(cfg: dict[str, Any]) -> Path:
    """The folder of the YAML; the working directory if Axolotl does not give a path or wrote the YAML itself.

    For the runs of a sweep, Axolotl writes the YAML into the folder for temporary files.
    """
    path = cfg.get("axolotl_config_path")
    if not isinstance(path, str | Path) or Path(path).resolve().parent == Path(tempfile.gettempdir()).resolve():
        return Path.cwd()
    return Path(path).resolve().parent


def _put_texts_of_files(raw: dict[str, Any], block: MethodConfig) -> None:
    """Replace template files by their content, so that no file is read when the block is validated again."""
    for key, template in (raw.get("directives") or {}).items():
        if isinstance(block, DimensionsConfig) and isinstance(template, Mapping):
            raw["directives"][key] = getattr(block.directives, key)


def _registered(cfg: dict[str, Any]) -> bool:
    """Whether `register` has already translated this configuration."""
    ours = cfg.get("rl") == _AXOLOTL_RL and cfg.get("trainer_cls") in {block.trainer for block in METHODS.values()}
    return ours and cfg.get("mopo_data") is not None


def _method(cfg: dict[str, Any]) -> str | None:
    """The method of this package that `rl:` names, or None."""
    rl = cfg.get("rl")
    if not isinstance(rl, str) or rl not in METHODS:
        return None
    if cfg.get("trainer_cls"):
        raise ConfigError(f"`trainer_cls` has no effect with `rl: {rl}`, which sets its own trainer; remove it")
    return rl

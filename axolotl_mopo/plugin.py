"""The plugin itself: the only room that knows Axolotl's hooks."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

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
from axolotl_mopo.data.entries import bind_entries
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.rewards.resolve import resolve_margins

LOG = get_logger("axolotl.mopo")

# ORPO is the host's one preference path that loads no reference model and hands the trainer a model with adapters.
_HOST_RL = "orpo"
_SUPERVISED_ARGUMENTS = (
    "dataloader_drop_last",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_timeout",
    "greater_is_better",
    "metric_for_best_model",
)
"""Training arguments that the host fills in for supervised training alone."""
_LOADING = {"dataloader_num_workers": 1, "dataloader_pin_memory": True, "dataloader_prefetch_factor": 8}
"""How batches are loaded where the YAML says nothing; Axolotl would make 256 ahead, gigabytes of long pairs."""


@dataclass
class MOPOTrainingArgs:
    """The field that the plugin adds to Axolotl's training arguments."""

    mopo: dict[str, Any] | None = field(default=None, metadata={"help": "The block of the method in use."})


class MOPOPlugin(BasePlugin):
    """Adds `rl: modpo` and `rl: amopo` to Axolotl.

    Add `axolotl_mopo.MOPOPlugin` to `plugins:`. Under any other `rl:` the plugin does nothing.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Check our part of the raw YAML and turn it into what the host knows; doing so twice changes nothing.

        Raises:
            ConfigError: before a model or a data set is loaded.
        """
        fold_dotted_keys(cfg)
        if _registered(cfg):
            return
        method = _method(cfg)
        if method is None:
            if not cfg.get("inference"):  # for which the host takes `rl` away
                no_stray_block(cfg)
            return
        check_hooks(MOPOPlugin, BasePlugin)
        if advice := version_advice():
            LOG.warning(advice)
        block = read_method(cfg, method, _yaml_folder(cfg))
        _put_texts_of_files(cfg[method], block)
        if advice := attention_advice(cfg, method, block):
            LOG.warning(advice)
            cfg[method]["layout"] = "padded"
        if advice := checkpoint_advice(cfg):
            LOG.warning(advice)
        if isinstance(block, MODPOConfig):
            block = resolve_margins(cfg, block)
        if all(cfg.get(key) is None for key in _LOADING):
            cfg.update(_LOADING)
        cfg["rl"], cfg["trainer_cls"] = _HOST_RL, block.trainer
        bind_entries(cfg, block)

    def get_input_args(self) -> str:
        """The pydantic fields that join the host's configuration."""
        return "axolotl_mopo.config.MOPOArgs"

    def get_training_args_mixin(self) -> str:
        """The dataclass field that joins the host's training arguments."""
        return "axolotl_mopo.plugin.MOPOTrainingArgs"

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Refuse to train or evaluate in a single process on several GPUs.

        Raises:
            ConfigError: where this process was not started by a launcher.
        """
        if _method_config(cfg) and cfg.rl and not cfg.merge_lora:
            check_devices()

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """The block of the method in use, for the trainer, and what the host leaves out for preference runs.

        Raises:
            ConfigError: where the host's arguments were made before it knew of the plugin.
        """
        block = _method_config(cfg)
        if block is None:
            return {}
        check_skipping(cfg, block.on_bad_loss)  # by now Axolotl knows what `bf16: auto` means
        from axolotl.core.training_args import AxolotlORPOConfig

        if "mopo" not in {known.name for known in fields(AxolotlORPOConfig)}:
            raise ConfigError(
                "another configuration was trained in this process before, without the plugin, and Axolotl has "
                "fixed its arguments since; list `axolotl_mopo.MOPOPlugin` there too, or start another process"
            )
        arguments: dict[str, Any] = {"mopo": block.model_dump(mode="json")}
        arguments["logging_nan_inf_filter"] = False  # it hides bad losses, and waits for the device in every step
        if cfg.dataloader_pin_memory is not False:  # batches are copied to the device while it computes
            arguments["accelerator_config"] = {"non_blocking": True, **(cfg.accelerator_config or {})}
        if cfg.group_by_length:
            arguments["train_sampling_strategy"] = "group_by_length"
        if cfg.load_best_model_at_end or cfg.early_stopping_patience:
            arguments["load_best_model_at_end"] = True
        return arguments | {key: cfg[key] for key in _SUPERVISED_ARGUMENTS if cfg.get(key) is not None}

    def add_callbacks_pre_trainer(self, cfg: DictDefault, model: Any) -> list[Any]:
        """What writes `mopo.json` and `mopo.png` beside every checkpoint."""
        from axolotl_mopo.training.callbacks import HistoryCallback, ManifestCallback

        block = _method_config(cfg)
        return [ManifestCallback(block, cfg.base_model), HistoryCallback()] if block else []

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Any) -> list[Any]:
        """Early stopping, which Axolotl leaves out for preference runs."""
        from transformers import EarlyStoppingCallback

        patience = cfg.early_stopping_patience
        return [EarlyStoppingCallback(patience)] if patience and _method_config(cfg) else []

    def post_train(self, cfg: DictDefault, model: Any) -> None:
        """Write `mopo.json` beside the final model."""
        from axolotl_mopo.training.callbacks import write_manifest

        block = _method_config(cfg)
        if block and os.environ.get("RANK", "0") == "0":  # by now Axolotl has ended the process group
            write_manifest(block, cfg.base_model, Path(cfg.output_dir))


def _method_config(cfg: DictDefault) -> MethodConfig | None:
    """The settings of the method in use; None if it is not one of ours."""
    return next((kind.model_validate(cfg[rl].to_dict()) for rl, kind in METHODS.items() if cfg.get(rl)), None)


def _yaml_folder(cfg: dict[str, Any]) -> Path:
    """The folder of the YAML, as far as Axolotl tells; the working directory where Axolotl wrote the YAML itself.

    It does so, into the folder for temporary files, for the runs of a sweep.
    """
    path = cfg.get("axolotl_config_path")
    if not isinstance(path, str | Path) or Path(path).resolve().parent == Path(tempfile.gettempdir()).resolve():
        return Path.cwd()
    return Path(path).resolve().parent


def _put_texts_of_files(raw: dict[str, Any], block: MethodConfig) -> None:
    """Replace files of templates by what they hold, so that no file is read when the block is validated again."""
    for key, template in (raw.get("directives") or {}).items():
        if isinstance(block, DimensionsConfig) and isinstance(template, Mapping):
            raw["directives"][key] = getattr(block.directives, key)


def _registered(cfg: dict[str, Any]) -> bool:
    ours = cfg.get("rl") == _HOST_RL and cfg.get("trainer_cls") in {block.trainer for block in METHODS.values()}
    return ours and cfg.get("mopo_data") is not None


def _method(cfg: dict[str, Any]) -> str | None:
    rl = cfg.get("rl")
    if not isinstance(rl, str) or rl not in METHODS:
        return None
    if cfg.get("trainer_cls"):
        raise ConfigError(f"`trainer_cls` has no effect with `rl: {rl}`, which brings its own trainer; remove it")
    return rl

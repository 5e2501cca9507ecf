"""Validates MODPO's margins and fills in settings that the margins' own files define, before any model is loaded."""

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from axolotl_mopo.config.methods import MODPOConfig
from axolotl_mopo.config.model_files import ADAPTER, AdapterConfig, read_model_file
from axolotl_mopo.config.settings import parse_settings
from axolotl_mopo.config.sources import RewardSource
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.rewards.implicit import base_model_change

_DEFAULT_PREPARED_PATH = "last_run_prepared"


def resolve_margins(cfg: MutableMapping[str, Any], block: MODPOConfig) -> MODPOConfig:
    """Fill in `cache_dir` and margin settings that the margins' own files define, also in the raw YAML.

    Raises:
        ConfigError: if a source does not exist, does not fit the run, or a setting is missing.
    """
    raw = cfg[block.rl]
    if block.cache_dir is None:
        prepared = cfg.get("dataset_prepared_path") or _DEFAULT_PREPARED_PATH
        if not isinstance(prepared, str):
            raise ConfigError(f"`dataset_prepared_path` is {prepared!r}; set it to the path of a folder")
        raw["cache_dir"] = str(Path(prepared) / "modpo-cache")
    for name, margin in block.margins.items():
        resolved = resolve_source(margin, f"`{block.rl}.margins.{name}", cfg)
        given = dict(margin)
        raw["margins"][name].update({key: value for key, value in resolved if value != given[key]})
    _check_policy(cfg, block)
    return parse_settings(type(block), raw, block.rl)


def _check_policy(cfg: Mapping[str, Any], block: MODPOConfig) -> None:
    """Refuse a policy adapter that changes the base model's weights if the original base model is needed.

    Raises:
        ConfigError: names the adapter's setting and the key that needs the base model.
    """
    change = _change_by_policy(cfg)
    if change is None:
        return
    if block.reference == "base":
        raise ConfigError(
            f"{change} changes the base model's weights, so it cannot be combined with `{block.rl}.reference: base`; "
            f"set `{block.rl}.reference: initial`, or start from another adapter"
        )
    for name, margin in block.margins.items():
        if margin.needs_base_model:
            raise ConfigError(
                f"{change} changes the base model's weights, which `{block.rl}.margins.{name}` needs as its reference; "
                "start from another adapter, or merge the margin's adapter and give the merged model and its "
                "`reference`"
            )


def _change_by_policy(cfg: Mapping[str, Any]) -> str | None:
    """Return the setting by which the policy's adapter changes the base model's weights, if there is one."""
    if not cfg.get("adapter"):
        return None
    if cfg.get("lora_model_dir"):
        path = Path(str(cfg["lora_model_dir"])) / ADAPTER
        if not path.exists():
            return None
        config = read_model_file(AdapterConfig, path, "`lora_model_dir`")
        change = base_model_change(config.init_lora_weights, config.layer_replication)
        return change and f"the {change} of the adapter in `lora_model_dir`"
    peft = cfg.get("peft")
    loftq = isinstance(peft, Mapping) and peft.get("loftq_config") is not None
    if not cfg.get("peft_init_lora_weights") and loftq:
        return "`peft.loftq_config`"
    change = base_model_change(cfg.get("peft_init_lora_weights"), cfg.get("peft_layer_replication"))
    return change and change.replace("`", "`peft_", 1)


def resolve_source(source: RewardSource, where: str, run: Mapping[str, Any] = MappingProxyType({})) -> RewardSource:
    """Validate a source without loading a model, and fill in settings that its own files define.

    Args:
        source: as the user gives it.
        where: the beginning of its key for messages, with an opening backtick and no closing one.
        run: the raw YAML of the run; empty outside of a run.

    Raises:
        ConfigError: if the source does not exist, does not fit the run, or a setting is missing.
    """
    try:
        return source.resolve(where, run)
    except ConfigError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}.path` cannot be read: {error}") from None

"""Validate the raw YAML and return the settings of a method."""

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from axolotl_mopo.config.host_keys import check_keys, check_skipping
from axolotl_mopo.config.methods import METHODS, MethodConfig
from axolotl_mopo.config.settings import parse_settings
from axolotl_mopo.errors import ConfigError


def fold_dotted_keys(cfg: MutableMapping[str, Any]) -> None:
    """Move top-level keys such as `modpo.weights` into their block, in place; sweeps only set top-level keys."""
    for dotted in [key for key in cfg if isinstance(key, str) and key.partition(".")[0] in METHODS and "." in key]:
        *parents, key = dotted.split(".")
        block = cfg
        for parent in parents:
            if block.get(parent) is None:
                block[parent] = {}
            block = block[parent]
            if not isinstance(block, MutableMapping):
                raise ConfigError(
                    f"`{dotted}`: `{parent}` is not a mapping, so nothing can be set in it; remove one of the two keys"
                )
        block[key] = cfg.pop(dotted)


def read_method(cfg: Mapping[str, Any], method: str, folder: Path | None = None) -> MethodConfig:
    """Check the raw YAML of a run of `rl: <method>` and return the method's block.

    Args:
        cfg: the raw YAML.
        method: a key of `METHODS`.
        folder: folder that must contain the template files of the YAML; None if it must not name any.

    Raises:
        ConfigError: if keys of the block are wrong, or keys outside it conflict with it; names the keys.
    """
    for other in METHODS:
        if other != method and cfg.get(other) is not None:
            raise ConfigError(f"`{other}:` has no effect with `rl: {method}`; remove the block, or set `rl: {other}`")
    if cfg.get(method) is None:
        required = " and ".join(name for name, field in METHODS[method].model_fields.items() if field.is_required())
        raise ConfigError(f"`rl: {method}` needs a block `{method}:` with at least {required}")
    check_keys(cfg, method)
    block = parse_settings(METHODS[method], cfg[method], method, folder)
    check_skipping(cfg, block.on_bad_loss)
    return block


def no_stray_block(cfg: Mapping[str, Any]) -> None:
    """Refuse a method's block under an `rl:` that would ignore it.

    Raises:
        ConfigError: if there is such a block; names it and `rl`.
    """
    for method in METHODS:
        if cfg.get(method) is not None:
            raise ConfigError(
                f"the block `{method}:` has no effect with `rl: {cfg.get('rl')}`; set `rl: {method}`, or remove the "
                "block"
            )

"""What the YAML leaves open of a margin and its source says, and every check that needs no model."""

import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from axolotl_mopo.config import (
    AdapterMargin,
    CallableMargin,
    ConfigError,
    MarginBlock,
    MODPOConfig,
    RewardModelMargin,
    parse_block,
)

_DEFAULT_PREPARED_PATH = "last_run_prepared"


def settle_margins(cfg: MutableMapping[str, Any], block: MODPOConfig) -> MODPOConfig:
    """Fill in the cache's folder and the betas that adapters were trained with, in the raw YAML too.

    Raises:
        ConfigError: where a source is not there, does not fit, or does not say its beta.
    """
    raw = cfg["modpo"]
    if block.cache_dir is None:
        raw["cache_dir"] = str(Path(cfg.get("dataset_prepared_path") or _DEFAULT_PREPARED_PATH) / "modpo-cache")
    sharded = bool(cfg.get("fsdp") or cfg.get("fsdp_config") or cfg.get("deepspeed"))
    for name, margin in block.margins.items():
        beta = check_margin(margin, f"`modpo.margins.{name}", sharded)
        if beta is not None:
            raw["margins"][name]["beta"] = beta
    return parse_block(MODPOConfig, raw, "modpo")


def check_margin(margin: MarginBlock, where: str, sharded: bool = False) -> float | None:
    """Hold a margin against its source, without loading a model.

    Args:
        margin: as the user gives it.
        where: the beginning of its key in messages, a backtick first.
        sharded: whether the policy's weights will be split.

    Returns:
        The beta of an implicit reward; None for every other source.

    Raises:
        ConfigError: where the source is not there, does not fit, or does not say its beta.
    """
    try:
        match margin:
            case AdapterMargin():
                return _adapter_beta(margin, where, sharded)
            case RewardModelMargin():
                _check_reward_model(margin, where)
            case CallableMargin():
                _check_function(margin, where)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{where}.path` cannot be read: {error}") from None
    return None


def _check_function(margin: CallableMargin, where: str) -> None:
    from axolotl_mopo.margins.functions import import_function

    try:
        import_function(margin.function)
    except ConfigError as error:
        raise ConfigError(f"{where}.function`: {error}") from None


def _adapter_beta(margin: AdapterMargin, where: str, sharded: bool) -> float:
    folder = Path(margin.path)
    if (folder / "adapter_config.json").exists():
        if margin.reference is not None:
            raise ConfigError(
                f"{where}.reference` has no effect: the reference of an adapter is the base model; drop it"
            )
        if sharded:
            raise ConfigError(
                f"{where}` is an adapter, which cannot be put into a model that FSDP or DeepSpeed has split; merge it "
                "with `axolotl merge-lora` and give the merged model and its `reference`"
            )
    elif folder.exists() and not (folder / "config.json").exists():
        raise ConfigError(f"{where}.path`: {folder} holds neither an adapter_config.json nor a config.json")
    elif margin.reference is None:
        raise ConfigError(
            f"{where}.path`: {margin.path} is no folder of a LoRA adapter, so it is taken for a whole model, and needs "
            "`reference`: the model that it was trained from"
        )
    recorded = _recorded_beta(folder)
    if margin.beta is None and recorded is None:
        raise ConfigError(
            f"{where}.beta` is missing, and no mopo.json in {folder} says it; give the beta of its training"
        )
    return recorded if margin.beta is None else margin.beta  # type: ignore[return-value]


def _recorded_beta(folder: Path) -> float | None:
    """The beta that a run of ours left beside the adapter, or beside the run whose checkpoint it is."""
    for path in (folder / "mopo.json", folder.parent / "mopo.json"):
        if path.is_file():
            beta = json.loads(path.read_text(encoding="utf-8")).get("beta")
            return float(beta) if isinstance(beta, int | float) else None
    return None


def _check_reward_model(margin: RewardModelMargin, where: str) -> None:
    """Hold the head against the config of a reward model that is on this machine."""
    path = Path(margin.path) / "config.json"
    if not path.is_file():
        return
    labels = json.loads(path.read_text(encoding="utf-8")).get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    try:
        find_head(margin, {str(name): int(index) for index, name in labels.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}.head`: {error}") from None


def find_head(margin: RewardModelMargin, labels: dict[str, int]) -> int:
    """The index of the score that a margin means.

    Args:
        margin: of a reward model.
        labels: the scores' names and indices, from the model's config.

    Raises:
        ConfigError: where the model has no such score, or has several and none is chosen.
    """
    known = f"{margin.path} has {len(labels)}: {', '.join(labels)}"
    if margin.head is None and len(labels) != 1:
        raise ConfigError(f"several scores and no `head`; {known}")
    if isinstance(margin.head, str):
        if margin.head not in labels:
            raise ConfigError(f"no score is called {margin.head!r}; {known}")
        return labels[margin.head]
    head = margin.head or 0
    if head not in labels.values():
        raise ConfigError(f"there is no score {head}; {known}")
    return head

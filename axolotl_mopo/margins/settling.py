"""What the YAML leaves open of a margin and its source says, and every check that needs no model."""

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

from axolotl.utils.logging import get_logger

from axolotl_mopo.config import (
    BLOCKS,
    AdapterMargin,
    CallableMargin,
    ConfigError,
    DimensionsBlock,
    MarginBlock,
    MODPOConfig,
    RewardModelMargin,
    parse_block,
)
from axolotl_mopo.records import ADAPTER, MANIFEST, AdapterConfig, Manifest, ModelConfig, Record, read_record

LOG = get_logger("axolotl.mopo")

R = TypeVar("R", bound=Record)

_DEFAULT_PREPARED_PATH = "last_run_prepared"
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to initialise LoRA that take what the adapter starts with out of the base model's weights."""
_WITHOUT_SCORES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def settle_margins(cfg: MutableMapping[str, Any], block: MODPOConfig) -> MODPOConfig:
    """Fill in the cache's folder and the betas that adapters were trained with, in the raw YAML too.

    Raises:
        ConfigError: where a source is not there, does not fit, or does not say its beta.
    """
    raw = cfg[block.rl]
    if block.cache_dir is None:
        prepared = cfg.get("dataset_prepared_path") or _DEFAULT_PREPARED_PATH
        if not isinstance(prepared, str):
            raise ConfigError(f"`dataset_prepared_path` is {prepared!r}; it must be a folder")
        raw["cache_dir"] = str(Path(prepared) / "modpo-cache")
    for name, margin in block.margins.items():
        beta = check_margin(margin, f"`{block.rl}.margins.{name}", cfg)
        if beta is not None:
            raw["margins"][name]["beta"] = beta
    _check_policy(cfg, block)
    return parse_block(type(block), raw, block.rl)


def _check_policy(cfg: Mapping[str, Any], block: MODPOConfig) -> None:
    """Refuse an adapter that changes the base model where the base model as it was is needed.

    Raises:
        ConfigError: naming both.
    """
    change = _change_by_policy(cfg)
    if change is None:
        return
    if block.reference == "base":
        raise ConfigError(
            f"{change} changes the base model's weights, so `{block.rl}.reference: base` does not go with it; set "
            f"`{block.rl}.reference: initial`, or start from another adapter"
        )
    for name, margin in block.margins.items():
        if isinstance(margin, AdapterMargin) and margin.reference is None:
            raise ConfigError(
                f"{change} changes the base model's weights, which `{block.rl}.margins.{name}` is measured against; "
                "start from another adapter, or merge the margin's and give the merged model and its `reference`"
            )


def _change_by_policy(cfg: Mapping[str, Any]) -> str | None:
    """What makes the policy's adapter change the base model's weights, if anything does."""
    if not cfg.get("adapter"):
        return None
    if cfg.get("lora_model_dir"):
        path = Path(str(cfg["lora_model_dir"])) / ADAPTER
        if not path.exists():
            return None
        config = _record(AdapterConfig, path, "`lora_model_dir`")
        change = _change_of_base(config.init_lora_weights, config.layer_replication)
        return change and f"the {change} of the adapter in `lora_model_dir`"
    peft = cfg.get("peft")
    loftq = isinstance(peft, Mapping) and peft.get("loftq_config") is not None
    if not cfg.get("peft_init_lora_weights") and loftq:
        return "`peft.loftq_config`"
    change = _change_of_base(cfg.get("peft_init_lora_weights"), cfg.get("peft_layer_replication"))
    return change and change.replace("`", "`peft_", 1)


def _change_of_base(init_lora_weights: Any, layer_replication: Any) -> str | None:
    """The setting of a LoRA adapter by which it changes the base model that it is put into, if there is one."""
    if str(init_lora_weights).lower().startswith(_CHANGES_THE_BASE):
        return f"`init_lora_weights: {init_lora_weights}`"
    return "`layer_replication`" if layer_replication else None


def check_margin(margin: MarginBlock, where: str, run: Mapping[str, Any] | None = None) -> float | None:
    """Hold a margin against its source, without loading a model.

    Args:
        margin: as the user gives it.
        where: the beginning of its key in messages, a backtick first.
        run: the raw YAML of the run that it is for, if it is for one.

    Returns:
        The beta of an implicit reward; None for every other source.

    Raises:
        ConfigError: where the source is not there, does not fit, or does not say its beta.
    """
    try:
        match margin:
            case AdapterMargin():
                return _adapter_beta(margin, where, run or {})
            case RewardModelMargin():
                _check_reward_model(margin, where)
            case CallableMargin():
                _check_function(margin, where)
    except ConfigError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}.path` cannot be read: {error}") from None
    return None


def _check_function(margin: CallableMargin, where: str) -> None:
    from axolotl_mopo.margins.functions import function_digest

    LOG.warning("%s.function` imports and runs the code of %s.", where, margin.function)
    try:
        function_digest(margin)
    except ConfigError as error:
        raise ConfigError(f"{where}.function`: {error}") from None


def _adapter_beta(margin: AdapterMargin, where: str, run: Mapping[str, Any]) -> float:
    folder = Path(margin.path)
    if (folder / ADAPTER).exists():
        _check_adapter(margin, where, run)
    elif folder.exists() and not (folder / "config.json").exists():
        raise ConfigError(f"{where}.path`: {folder} holds neither an adapter_config.json nor a config.json")
    elif margin.reference is None:
        raise ConfigError(
            f"{where}.path`: {margin.path} is no folder of a LoRA adapter, so it is taken for a whole model, and needs "
            "`reference`: the model that it was trained from"
        )
    for key, path in (("path", margin.path), ("reference", margin.reference)):
        if path is not None and not Path(path).exists():
            LOG.warning("%s.%s`: %s is no folder here and is fetched from the model hub.", where, key, path)
    beta = _recorded_beta(folder, where) if margin.beta is None else margin.beta
    if beta is None:
        raise ConfigError(
            f"{where}.beta` is missing, and no mopo.json in {folder} says it; give the beta of its training"
        )
    return beta


def _check_adapter(margin: AdapterMargin, where: str, run: Mapping[str, Any]) -> None:
    """Check an adapter's own configuration against the run."""
    if margin.reference is not None:
        raise ConfigError(f"{where}.reference` has no effect: the reference of an adapter is the base model; drop it")
    if run.get("fsdp") or run.get("fsdp_config") or run.get("deepspeed"):
        raise ConfigError(
            f"{where}` is an adapter, which cannot be put into a model that FSDP or DeepSpeed has split; merge it "
            "with `axolotl merge-lora` and give the merged model and its `reference`"
        )
    config = _record(AdapterConfig, Path(margin.path) / ADAPTER, f"{where}.path`")
    if config.peft_type != "LORA":
        raise ConfigError(
            f"{where}.path`: {margin.path} is an adapter of the type {config.peft_type}, not LORA; merge it into its "
            "base model and give the merged model and its `reference`"
        )
    if change := _change_of_base(config.init_lora_weights, config.layer_replication):
        raise ConfigError(
            f"{where}.path`: {margin.path} has {change}, which changes the base model that it is put into, so the base "
            "model is not its reference; save it again with PEFT's `path_initial_model_for_weight_conversion`, or "
            "merge it and give the merged model and its `reference`"
        )
    theirs, ours = config.base_model_name_or_path, run.get("base_model")
    if theirs and ours and not _same_model(theirs, str(ours)):
        LOG.warning(
            "%s.path`: %s was trained on the base model %s, and this run's is %s; its rewards mean something only if "
            "the two are the same.",
            where,
            margin.path,
            theirs,
            ours,
        )


def _same_model(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def _recorded_beta(folder: Path, where: str) -> float | None:
    """The beta that a run of ours left beside the adapter, or beside the run whose checkpoint it is.

    Raises:
        ConfigError: where that run had no reference, which an implicit reward is measured against.
    """
    for path in (folder / MANIFEST, folder.parent / MANIFEST):
        if path.exists():
            manifest = _record(Manifest, path, f"{where}.path`")
            if issubclass(BLOCKS.get(manifest.method, MODPOConfig), DimensionsBlock):
                raise ConfigError(
                    f"{where}.beta`: {path} is of a run of `rl: {manifest.method}`, which has no reference, so its "
                    "beta gives no implicit reward; train the margin's adapter by DPO or `rl: modpo`"
                )
            return manifest.beta
    return None


def _check_reward_model(margin: RewardModelMargin, where: str) -> None:
    """Hold the head against the config of a reward model that is on this machine."""
    folder = Path(margin.path)
    path = folder / "config.json"
    if not path.exists():
        if folder.exists():
            raise ConfigError(f"{where}.path`: {folder} holds no config.json; give the folder of a whole reward model")
        LOG.warning("%s.path`: %s is no folder here and is fetched from the model hub.", where, margin.path)
        return
    config = _record(ModelConfig, path, f"{where}.path`")
    kinds = config.architectures or []
    if kinds and all(kind.endswith(_WITHOUT_SCORES) for kind in kinds):
        raise ConfigError(
            f"{where}.path`: {folder} is a {kinds[0]}, which has no head of scores; give a sequence-classification "
            "model, or use `source: adapter` for an implicit reward"
        )
    labels = config.id2label or {"0": "LABEL_0", "1": "LABEL_1"}
    if odd := [index for index in labels if not index.isdecimal()]:
        raise ConfigError(f"{where}.path`: {path}, `id2label`: {odd[0]!r:.60} is not an index; correct the file")
    try:
        find_head(margin, {str(name): int(index) for index, name in labels.items()})
    except ConfigError as error:
        raise ConfigError(f"{where}.head`: {error}") from None


def _record(model: type[R], path: Path, where: str) -> R:
    """A JSON file of a source.

    Raises:
        ConfigError: where it cannot be read, or holds something else than such a file does.
    """
    try:
        return read_record(model, path)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None


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

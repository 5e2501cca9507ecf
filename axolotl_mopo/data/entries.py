"""The entries of `datasets:` and `test_datasets:` that name one of our strategies.

The host drops keys that it does not know from an entry, and names prepared rows after the entry's own keys only. So
what a strategy needs (the entry's keys of ours, the method's settings) is put aside under a key made of its content,
and that key joins the entry's `type`: rows prepared under other settings have another name and are never served.
"""

import hashlib
import json
import re
from collections.abc import Iterable, MutableMapping
from copy import copy
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from axolotl_mopo.config import (
    ColumnMargin,
    ConfigError,
    DimensionsBlock,
    Directives,
    LengthMargin,
    MethodConfig,
    MODPOConfig,
    RewardModelMargin,
    TextMargin,
    parse_block,
)
from axolotl_mopo.data.content import data_digest, data_paths, tokenizer_digest
from axolotl_mopo.data.files import data_fault
from axolotl_mopo.data.formats import FORMATS, Format
from axolotl_mopo.data.options import EntryOptions, ObjectiveOptions, ScoredOptions
from axolotl_mopo.data.reading import Reading
from axolotl_mopo.version import __version__

PREFIX = "axolotl_mopo."

_HOST_KEYS = ("path", "name", "split", "data_files", "revision", "ds_type", "trust_remote_code", "type")
_LARGEST_SCORE = 1e100
_IGNORED_HOST_KEYS = ("shards", "shards_idx", "preprocess_shards")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.json)(?<!\.jsonl)(?<!\.parquet)(?<!\.csv)")


class AMoPOData(BaseModel):
    """What AMoPO's settings mean for the rows, or those of another method with a prompt for every dimension."""

    method: Literal["amopo"] = "amopo"
    dimensions: list[str]
    integrated: bool
    score_range: tuple[float, float]
    directives: Directives
    directive_position: Literal["before", "after"]


class MODPOData(BaseModel):
    """What MODPO's settings mean for the rows, or those of another method with margins.

    The weights do not matter here, so a sweep shares its prepared rows.
    """

    method: Literal["modpo"] = "modpo"
    columns: dict[str, str]
    """Margins that are scores of the data set, and the scores' names."""
    lengths: dict[str, str]
    """Margins that are lengths, and their units."""
    texts: bool
    """Whether a margin reads the texts."""


class DataSpec(BaseModel):
    """Everything that decides how the rows of one data set become training examples."""

    model_config = ConfigDict(frozen=True)

    where: str
    """The entry in the YAML and its path, for messages."""
    strategy: str
    options: dict[str, Any]
    objective: tuple[str, ...]
    """What orders responses that no label orders."""
    seed: int | None
    """Set where it decides which pairs are kept."""
    data: Annotated[AMoPOData | MODPOData, Field(discriminator="method")]
    excess_length_strategy: str
    """The host's own key; the host leaves it out of the name of prepared rows."""
    content: tuple[str, str]
    """Names of the local files that the data and the tokenizer are read from; the host knows them by their paths."""
    reading_version: int = 2
    """Changes where the same rows and options are read as other examples."""
    version: str = __version__

    @field_validator("options", mode="before")
    @classmethod
    def _plain(cls, options: Any) -> Any:
        # Axolotl turns mappings within mappings into a kind of its own, which has every attribute that is asked for.
        return json.loads(json.dumps(options))

    @property
    def key(self) -> str:
        """A name made of the content."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def format(self) -> Format:
        """How the rows are laid out."""
        return FORMATS[self.strategy]

    @property
    def scales(self) -> dict[str, tuple[float, float]]:
        """AMoPO: the data set's own scale of every dimension, `score_range` where nothing says another."""
        if not isinstance(self.data, AMoPOData):
            return {}
        if own := self.options.get("score_scale"):
            return dict.fromkeys(self.data.dimensions, tuple(own))
        return {name: self.format.scales.get(name, self.data.score_range) for name in self.data.dimensions}

    @property
    def reading(self) -> Reading:
        """What is needed of the rows."""
        names = _score_names(self.data)
        return Reading(
            self.format.options.model_validate(self.options),
            self.objective,
            chosen_scores=tuple(names),
            rejected_scores=tuple(names) if isinstance(self.data, MODPOData) else (),
            scales=self.scales,
            **({} if self.seed is None else {"seed": self.seed}),
        )


def bind_entries(cfg: MutableMapping[str, Any], block: MethodConfig) -> None:
    """Check every data-set entry and bind it to the settings that its rows depend on, in place.

    Raises:
        ConfigError: naming entry and key.
    """
    if cfg.get("mopo_data") is not None:
        raise ConfigError("`mopo_data` is what the plugin fills in itself; remove it")
    try:
        tokenizer = tokenizer_digest(cfg)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of `base_model` cannot be read: {error}") from None
    specs: dict[str, Any] = {}
    for section in ("datasets", "test_datasets"):
        entries = cfg.get(section) or []
        if not isinstance(entries, list):
            raise ConfigError(f"`{section}` must be a list of mappings with `path` and `type`, not {entries!r}")
        # An anchor in the YAML may have put one entry, or the whole list, into both sections.
        entries = [copy(entry) for entry in entries]
        for index, entry in enumerate(entries):
            where = f"{section}[{index}]"
            if not isinstance(entry, MutableMapping):
                raise ConfigError(f"`{where}` must be a mapping with `path` and `type`, not {entry!r}")
            spec = _spec(cfg, block, entry, where, tokenizer)
            specs[spec.key] = spec.model_dump(mode="json")
            for key in set(entry) - set(_HOST_KEYS):
                del entry[key]
            entry["type"] = f"{PREFIX}{spec.strategy}@{spec.key}"
        if entries:
            cfg[section] = entries
    cfg["mopo_data"] = specs


def _spec(
    cfg: MutableMapping[str, Any],
    block: MethodConfig,
    entry: MutableMapping[str, Any],
    where: str,
    tokenizer: str,
) -> DataSpec:
    known = ", ".join(PREFIX + name for name in FORMATS)
    kind = entry.get("type")
    strategy = kind.removeprefix(PREFIX) if isinstance(kind, str) and kind.startswith(PREFIX) else None
    if strategy not in FORMATS:
        raise ConfigError(f"`{where}.type` is {kind!r}; with `rl: {block.rl}` it must be one of {known}")
    _check_host_keys(entry, where, block.rl)
    format = FORMATS[strategy]
    options = parse_block(format.options, {key: value for key, value in entry.items() if key not in _HOST_KEYS}, where)
    if isinstance(options, ScoredOptions) and options.score_scale:
        _check_scale(options.score_scale, where)
    data = _data_settings(block)
    if isinstance(data, MODPOData) and getattr(options, "score_scale", None):
        raise ConfigError(
            f"`{where}.score_scale` has no effect with `rl: {block.rl}`, which has no directives; remove it"
        )
    _check_scores(block, data, options, format, where, strategy)
    content = _check_files(entry, where), tokenizer
    return DataSpec(
        where=f"{where} ({entry.get('path')})",
        strategy=strategy,
        options=options.model_dump(mode="json"),
        objective=_objective(block, options, format, where),
        seed=_seed(cfg) if options.max_pairs_per_prompt else None,
        data=data,
        excess_length_strategy=str(cfg.get("excess_length_strategy") or "drop").lower(),
        content=content,
    )


def _check_files(entry: MutableMapping[str, Any], where: str) -> str:
    """Hold local files against what keeps them from being read.

    Returns:
        A name made of their content.
    """
    paths = data_paths(entry)
    try:
        digest = data_digest(entry)
        patterns = [path for path in paths if has_magic(str(path)) and str(path) != entry.get("ratings")]
        literal = next((path for path in patterns if path.is_file()), None)
        read = [path for path in paths if not (path.is_dir() and entry.get("data_files"))]
        fault = next(filter(None, (data_fault(path, entry.get("ds_type")) for path in read)), None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"`{where}` cannot be read: {error}") from None
    if literal:
        raise ConfigError(f"`{where}`: Axolotl reads {literal} as a pattern, for its `*`, `?` or `[`; rename the file")
    if fault:
        raise ConfigError(f"`{where}`: {fault}")
    return digest


def _check_host_keys(entry: MutableMapping[str, Any], where: str, method: str) -> None:
    for key in _IGNORED_HOST_KEYS:
        if entry.get(key) is not None:
            raise ConfigError(
                f"`{where}.{key}` has no effect with `rl: {method}`, whose data the host does not shard; take a part "
                "with `split: train[:10%]`"
            )
    if isinstance(entry.get("name"), list):
        raise ConfigError(f"`{where}.name` is a list; write one entry for each name")
    files = entry.get("data_files")
    if files is not None and not isinstance(files, str) and not _is_names(files):
        raise ConfigError(f"`{where}.data_files` is {files!r}; it must be the name of a file, or a list of names")
    path = entry.get("path")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"`{where}.path` is {path!r}; it must name a file, a folder or a data set of the hub")
    try:
        folder = Path(path).is_dir() and not (Path(path) / "state.json").exists()
        hub = not Path(path).exists() and _HUB_ID.fullmatch(path)
    except OSError as error:
        raise ConfigError(f"`{where}.path` cannot be read: {error}") from None
    several = (folder or hub) and not entry.get("data_files")
    if where.startswith("test_datasets") and several and not entry.get("split"):
        raise ConfigError(
            f"`{where}.split` is missing; the host would evaluate on the train split of {path}; say `split: test` or "
            "what the data set calls it"
        )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _objective(block: MethodConfig, options: EntryOptions, format: Format, where: str) -> tuple[str, ...]:
    """What orders responses that no label orders: the entry's own word, or else what the method trains for."""
    if not isinstance(options, ObjectiveOptions):
        return ()
    if options.objective is not None:
        given = [options.objective] if isinstance(options.objective, str) else options.objective
        if fault := format.objective_fault(given):
            raise ConfigError(f"`{where}.objective`: {fault}")
        return tuple(given)
    if isinstance(block, MODPOConfig):
        key, names = f"{block.rl}.objective", [block.objective]
    else:
        key, names = f"{block.rl}.dimensions", block.dimensions
    if not (fault := format.objective_fault(names)):
        return tuple(names)
    if format.read_pair and format.read_responses:
        # Only the data's columns tell whether a label orders its pairs.
        return ()
    raise ConfigError(f"`{where}.objective` is missing, and `{key}` does not say what orders the pairs: {fault}")


def _check_scale(scale: tuple[float, float], where: str) -> None:
    """Refuse a scale whose width cannot be computed with."""
    if max(map(abs, scale)) > _LARGEST_SCORE:
        raise ConfigError(
            f"`{where}.score_scale` goes from {scale[0]:g} to {scale[1]:g}, too far to be mapped to `score_range`; "
            f"choose numbers up to {_LARGEST_SCORE:g}"
        )


def _check_scores(
    block: MethodConfig,
    data: AMoPOData | MODPOData,
    options: EntryOptions,
    format: Format,
    where: str,
    strategy: str,
) -> None:
    """Refuse scores that data of this kind never holds."""
    names = _score_names(data)
    possible: Iterable[str] | None = format.scales or None
    if possible is None and not isinstance(options, ScoredOptions):
        possible = ()
    if isinstance(data, AMoPOData) and (worse := [name for name in names if name in format.higher_is_worse]):
        raise ConfigError(
            f"`{block.rl}.dimensions` has {', '.join(worse)}, of which more is worse in `{where}`, and directives ask "
            "for the most; remove it, or give it a negative weight in a run of `rl: modpo`"
        )
    if possible is not None and (unknown := [name for name in names if name not in possible]):
        key = "dimensions" if isinstance(data, AMoPOData) else "margins"
        raise ConfigError(
            f"`{block.rl}.{key}` needs a score of {', '.join(unknown)} from `{where}`, but {strategy} holds "
            f"{', '.join(possible) or 'no scores'}"
        )


def _seed(cfg: MutableMapping[str, Any]) -> int:
    seed = cfg.get("seed")
    if seed is None:
        return 42
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"`seed` is {seed!r}; it must be a whole number")
    return seed


def _data_settings(block: MethodConfig) -> MODPOData | AMoPOData:
    if isinstance(block, DimensionsBlock):
        return AMoPOData(
            dimensions=block.dimensions,
            integrated=block.integrated,
            score_range=block.score_range,
            directives=block.directives,
            directive_position=block.directive_position,
        )
    margins = block.margins.items()
    return MODPOData(
        columns={name: margin.field or name for name, margin in margins if isinstance(margin, ColumnMargin)},
        lengths={name: margin.unit for name, margin in margins if isinstance(margin, LengthMargin)},
        texts=any(isinstance(margin, RewardModelMargin | TextMargin) for _, margin in margins),
    )


def _score_names(data: AMoPOData | MODPOData) -> list[str]:
    return data.dimensions if isinstance(data, AMoPOData) else list(data.columns.values())

"""Check the entries of `datasets:` and `test_datasets:` and bind them to their settings.

Axolotl drops unknown keys from an entry, and names prepared rows by a hash of the entry's own keys only. So the
settings that a strategy needs (this package's keys of the entry, the method's settings) are stored in `mopo_data` under
a digest of their content, and the digest is appended to the entry's `type`. Rows prepared with other settings then have
another name and are never reused.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from copy import copy
from glob import has_magic
from pathlib import Path
from typing import Any

from axolotl_mopo.config import MethodConfig, RowSettings, parse_settings
from axolotl_mopo.data.file_checks import data_digest, data_fault, data_paths
from axolotl_mopo.data.formats import FORMATS, Format
from axolotl_mopo.data.options import EntryOptions, ObjectiveOptions, ScoredOptions
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.digests import tokenizer_digest
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.files import is_hub_name

PREFIX = "axolotl_mopo."

_AXOLOTL_KEYS = ("path", "name", "split", "data_files", "revision", "ds_type", "trust_remote_code", "type")
_LARGEST_SCORE = 1e100
_IGNORED_AXOLOTL_KEYS = ("shards", "shards_idx", "preprocess_shards")
_FILES = (".json", ".jsonl", ".parquet", ".csv")


def bind_entries(cfg: MutableMapping[str, Any], block: MethodConfig) -> None:
    """Check every data-set entry and bind it to the settings that its rows depend on, in place.

    Raises:
        ConfigError: if an entry is not valid; it names the entry and the key.
    """
    if cfg.get("mopo_data") is not None:
        raise ConfigError("`mopo_data` is set by the plugin; remove it")
    try:
        tokenizer = tokenizer_digest(cfg)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of `base_model` cannot be read: {error}") from None
    if not isinstance(cfg.get("chat_template_kwargs") or {}, Mapping):
        raise ConfigError(
            f"`chat_template_kwargs` is {cfg['chat_template_kwargs']!r:.60}; it must map variables of the chat "
            "template to values, such as {enable_thinking: false}"
        )
    specs: dict[str, Any] = {}
    for section in ("datasets", "test_datasets"):
        entries = cfg.get(section) or []
        if not isinstance(entries, list):
            raise ConfigError(f"`{section}` must be a list of mappings with `path` and `type`, not {entries!r}")
        # With a YAML anchor, both sections may share an entry or the whole list.
        entries = [copy(entry) for entry in entries]
        for index, entry in enumerate(entries):
            where = f"{section}[{index}]"
            if not isinstance(entry, MutableMapping):
                raise ConfigError(f"`{where}` must be a mapping with `path` and `type`, not {entry!r}")
            spec = _spec(cfg, block, entry, where, tokenizer)
            specs[spec.key] = spec.model_dump(mode="json")
            for key in set(entry) - set(_AXOLOTL_KEYS):
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
    _check_axolotl_keys(entry, where, block.rl)
    format = FORMATS[strategy]
    options = parse_settings(
        format.options, {key: value for key, value in entry.items() if key not in _AXOLOTL_KEYS}, where
    )
    if isinstance(options, ScoredOptions) and options.score_scale:
        _check_scale(options.score_scale, where)
    settings = block.row_settings
    scales = _scales(settings, options, format)
    if not scales and getattr(options, "score_scale", None):
        raise ConfigError(
            f"`{where}.score_scale` has no effect with `rl: {block.rl}`, which has no directives; remove it"
        )
    _check_scores(block, settings, options, format, where, strategy)
    content = _check_files(entry, where), tokenizer
    objective = _objective(block, options, format, where)
    return DataSpec(
        where=f"{where} ({entry.get('path')})",
        strategy=strategy,
        options=options,
        objective=objective,
        chosen_scores=tuple(settings.score_names),
        rejected_scores=tuple(settings.rejected_score_names),
        scales=scales,
        settings=settings,
        excess_length_strategy=str(cfg.get("excess_length_strategy") or "drop").lower(),
        content=content,
        chat_template_kwargs=dict(cfg.get("chat_template_kwargs") or {}),
        seed=_seed(cfg) if options.max_pairs_per_prompt else 0,  # an unused seed must not change the key
    )


def _scales(settings: RowSettings, options: EntryOptions, format: Format) -> dict[str, tuple[float, float]]:
    """Return the data set's scale of every score in directives: the entry's, the format's, or `score_range`."""
    if settings.score_range is None:
        return {}
    if own := getattr(options, "score_scale", None):
        return dict.fromkeys(settings.score_names, own)
    return {name: format.scales.get(name, settings.score_range) for name in settings.score_names}


def _check_files(entry: MutableMapping[str, Any], where: str) -> str:
    """Check that local files can be read.

    Returns:
        A digest of their content.
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
        raise ConfigError(
            f"`{where}`: Axolotl reads {literal} as a pattern because of its `*`, `?` or `[`; rename the file"
        )
    if fault:
        raise ConfigError(f"`{where}`: {fault}")
    return digest


def _check_axolotl_keys(entry: MutableMapping[str, Any], where: str, method: str) -> None:
    for key in _IGNORED_AXOLOTL_KEYS:
        if entry.get(key) is not None:
            raise ConfigError(
                f"`{where}.{key}` has no effect with `rl: {method}`, because Axolotl does not shard preference data; "
                "select a part with `split: train[:10%]`"
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
        hub = not Path(path).exists() and "/" in path and is_hub_name(path) and not path.endswith(_FILES)
    except OSError as error:
        raise ConfigError(f"`{where}.path` cannot be read: {error}") from None
    several = (folder or hub) and not entry.get("data_files")
    if where.startswith("test_datasets") and several and not entry.get("split"):
        raise ConfigError(
            f"`{where}.split` is missing; Axolotl would evaluate on the train split of {path}; set `split: test`, or "
            "the data set's own name of that split"
        )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _objective(block: MethodConfig, options: EntryOptions, format: Format, where: str) -> tuple[str, ...]:
    """Return the scores that order responses without a label: the entry's `objective`, else what the method trains."""
    if not isinstance(options, ObjectiveOptions):
        return ()
    if options.objective is not None:
        if fault := format.objective_fault(options.objectives):
            raise ConfigError(f"`{where}.objective`: {fault}")
        return options.objectives
    key, names = block.ordering
    if not (fault := format.objective_fault(names)):
        return tuple(names)
    if format.read_pair and format.read_responses:
        # Whether a label orders the pairs is known only once the data's columns are read.
        return ()
    raise ConfigError(f"`{where}.objective` is missing, and `{block.rl}.{key}` cannot be used instead: {fault}")


def _check_scale(scale: tuple[float, float], where: str) -> None:
    """Check that a scale is not too wide for floating-point arithmetic."""
    if max(map(abs, scale)) > _LARGEST_SCORE:
        raise ConfigError(
            f"`{where}.score_scale` goes from {scale[0]:g} to {scale[1]:g}, which is too wide to map to `score_range`; "
            f"choose numbers up to {_LARGEST_SCORE:g}"
        )


def _check_scores(
    block: MethodConfig, settings: RowSettings, options: EntryOptions, format: Format, where: str, strategy: str
) -> None:
    """Check that data of this type can have the scores that the method needs."""
    possible: Iterable[str] | None = format.scales or None
    if possible is None and not isinstance(options, ScoredOptions):
        possible = ()
    worse = [name for name in settings.score_names if name in format.higher_is_worse]
    if settings.score_range and worse:
        raise ConfigError(
            f"`{block.rl}.{settings.scores_key}` has {', '.join(worse)}, for which higher is worse in `{where}`, but "
            "directives ask for the highest score; remove it, or use `rl: modpo` and give it a negative weight"
        )
    if possible is not None and (unknown := [name for name in settings.score_names if name not in possible]):
        raise ConfigError(
            f"`{block.rl}.{settings.scores_key}` needs a score of {', '.join(unknown)} from `{where}`, but {strategy} "
            f"has {', '.join(possible) or 'no scores'}"
        )


def _seed(cfg: MutableMapping[str, Any]) -> int:
    seed = cfg.get("seed")
    if seed is None:
        return 42
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"`seed` is {seed!r}; it must be a whole number")
    return seed

"""Prepare the small run that tests a configuration: its YAML, model and rows in one folder."""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import yaml
from axolotl.integrations.base import load_plugin
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from axolotl_mopo.commands import tiny_models
from axolotl_mopo.commands.cpu_keys import Replaced, for_a_cpu
from axolotl_mopo.commands.sample_rows import few, hub_has, made_up, own_rows, sample_rows
from axolotl_mopo.config import (
    METHODS,
    MethodConfig,
    MODPOConfig,
    PromptSettings,
    RewardSource,
    fold_dotted_keys,
    no_stray_block,
    read_method,
)
from axolotl_mopo.config.model_files import ModelConfig
from axolotl_mopo.config.sources import ModelKind
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.plugin import MOPOPlugin
from axolotl_mopo.records import read_record
from axolotl_mopo.rewards.resolve import resolve_source

T = TypeVar("T")

_BYTES_OF_A_TOKEN = 4
_LONGEST = 4096
_UNKNOWN_BETA = 0.1
_OF_ANOTHER_TOKENIZER = (
    "tokenizer_type",
    "tokenizer_use_fast",
    "tokenizer_legacy",
    "tokenizer_use_mistral_common",
    "added_tokens_overrides",
)
_OF_ANOTHER_MODEL = ("model_type", "overrides_of_model_config", "overrides_of_model_kwargs", "is_mistral_derived_model")
_DROPPED_OF_ENTRIES = ("data_files", "name", "revision", "shards", "shards_idx", "preprocess_shards")


@dataclass
class Plan:
    """A small run, ready to train."""

    source: Path
    """The user's configuration."""
    config: Path
    """The configuration of the test."""
    method: str
    notes: list[str] = field(default_factory=list)
    """The models and the data of the test."""
    replaced: list[Replaced] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """What the user should know before the run."""
        yield f"Testing {self.source} ({self.method}) with:"
        yield from (f"  {line}" for line in self.notes)
        if changed := [str(each) for each in self.replaced if each.is_exercised]:
            yield "Tested with another value:"
            yield from (f"  {line}" for line in changed)
        if left := [str(each) for each in self.replaced if not each.is_exercised]:
            yield "Not tested on this machine:"
            yield from (f"  {line}" for line in left)


def plan(config: Path, folder: Path, samples: Sequence[str], trust: bool) -> Plan:
    """Prepare the small run of a configuration.

    Args:
        config: the user's YAML.
        folder: folder for all files of the run.
        samples: samples of the data, in the order of `datasets:` and then `test_datasets:`.
        trust: whether models and tokenizers may run their own code.

    Raises:
        ConfigError, DataError, OSError: if the configuration or a sample is wrong.
        ImportError, AttributeError: if a plugin that it names cannot be imported.
    """
    return _Planner(config, folder, trust).plan(samples)


class _Planner:
    def __init__(self, config: Path, folder: Path, trust: bool) -> None:
        self.source, self.folder, self.trust = config, folder, trust
        self.cfg = _read(config)
        self.notes: list[str] = []
        self.replaced: list[Replaced] = []

    def plan(self, samples: Sequence[str]) -> Plan:
        with _quietly():
            block = self._check_method()
            self._check_samples(samples)
            tokenizer = self._put_model()
            if isinstance(block, MODPOConfig):
                self._put_margins(block, tokenizer)
            specs = self._check_with_plugin(block)
            self._put_rows(block, specs, list(samples))
        cfg, replaced = for_a_cpu(self.cfg, self.trust)
        self.replaced += replaced
        cfg |= {"output_dir": str(self.folder / "out"), "dataset_prepared_path": str(self.folder / "prepared")}
        if block is not None:
            cfg[block.rl] = _own_settings(cfg[block.rl], block, self.folder)
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(cfg, sort_keys=False), encoding="utf-8")
        environment = {"HF_DATASETS_CACHE": str(self.folder / "cache")}
        if not _runs_code(block):
            environment["HF_HUB_OFFLINE"] = "1"
        method = f"`rl: {cfg['rl']}`" if cfg.get("rl") else "supervised fine-tuning"
        return Plan(self.source, path, method, self.notes, self.replaced, environment)

    def _check_method(self) -> MethodConfig | None:
        """The method's block, validated as the user wrote it; None for a method of Axolotl."""
        cfg = self.cfg
        plugins = cfg.get("plugins") or []
        if not isinstance(plugins, list):
            raise ConfigError(f"`plugins` is {plugins!r}; it must be a list of dotted names")
        ours = [load_plugin(str(name)) for name in plugins if not _is_of_axolotl(str(name))]
        if not any(isinstance(plugin, MOPOPlugin) for plugin in ours):
            return None
        fold_dotted_keys(cfg)
        method = cfg.get("rl")
        if method not in METHODS:
            no_stray_block(cfg)
            return None
        return read_method(cfg, str(method), self.source.resolve().parent)

    def _check_with_plugin(self, block: MethodConfig | None) -> dict[str, list[DataSpec]]:
        """Let the plugin check the configuration as `axolotl train` does, with only the models replaced.

        Returns:
            For each section, how to read the rows of its entries, in order.
        """
        if block is None:
            return {}
        cfg = copy.deepcopy(self.cfg)
        cfg["axolotl_config_path"] = str(self.source)
        MOPOPlugin().register(cfg)
        settings = cfg["mopo_data"]
        return {
            section: [DataSpec.model_validate(settings[entry["type"].partition("@")[2]]) for entry in cfg[section]]
            for section in ("datasets", "test_datasets")
            if cfg.get(section)
        }

    def _check_samples(self, samples: Sequence[str]) -> None:
        entries = [*_entries(self.cfg, "datasets"), *_entries(self.cfg, "test_datasets")]
        if len(samples) > len(entries):
            raise ConfigError(
                f"--data is given {len(samples)} times, and there are {len(entries)} data-set entries; give it at most "
                "once per entry"
            )

    def _put(self, key: str, new: Any, why: str, is_exercised: bool = True) -> None:
        self.replaced.append(Replaced(key, self.cfg.get(key), new, why, is_exercised))
        self.cfg[key] = new
        if new is None:
            del self.cfg[key]

    def _put_model(self) -> PreTrainedTokenizerBase:
        """Replace the base model by a tiny one, and return its tokenizer."""
        cfg = self.cfg
        base = cfg.get("base_model")
        if not isinstance(base, str) or not base:
            raise ConfigError(f"`base_model` is {base!r}; it must name a folder or a model of the hub")
        architecture = self._architecture(str(cfg.get("base_model_config") or base))
        tokenizer = self._tokenizer(str(cfg.get("tokenizer_config") or cfg.get("base_model_config") or base))
        model = self._model(architecture, tokenizer, base)
        folder = self.folder / "model"
        tiny_models.save(model, tokenizer, folder)
        cfg["base_model"] = str(folder)
        for key in ("base_model_config", "tokenizer_config", "revision_of_model"):
            cfg.pop(key, None)
        self._fit_adapter(model)
        return tokenizer

    def _architecture(self, source: str) -> PretrainedConfig | None:
        if not _is_available(source, "config.json"):
            return None
        return self._load("architecture", tiny_models.load_architecture, source)

    def _load(self, what: str, load: Callable[..., T], source: str) -> T | None:
        """Load a part of a model; note it and return None if it cannot be read."""
        try:
            return load(source, trust=self.trust)
        except (OSError, ValueError, KeyError, ImportError) as error:
            if "trust_remote_code" in str(error):
                raise ConfigError(
                    f"the {what} of {source} has its own code; allow it with --trust-remote-code"
                ) from None
            self.notes.append(f"the {what} of {source} cannot be read ({_first_line(error)})")
            return None

    def _tokenizer(self, source: str) -> PreTrainedTokenizerBase:
        if _is_available(source, "tokenizer_config.json"):
            tokenizer = self._load("tokenizer", tiny_models.load_tokenizer, source)
            if tokenizer is not None:
                self.notes.append(f"the tokenizer of {source}")
                return tokenizer
        self.notes.append(f"a tokenizer of bytes with ChatML's template, since that of {source} is not available")
        for key in _OF_ANOTHER_TOKENIZER:
            if self.cfg.get(key) is not None:
                self._put(key, None, "it applies to another tokenizer", is_exercised=False)
        length = self.cfg.get("sequence_len")
        if isinstance(length, int) and length < _LONGEST:
            longer = min(_BYTES_OF_A_TOKEN * length, _LONGEST)
            self._put(
                "sequence_len",
                longer,
                f"a token of about {_BYTES_OF_A_TOKEN} characters is {_BYTES_OF_A_TOKEN} bytes here",
            )
        return tiny_models.byte_tokenizer(list(_named_tokens(self.cfg)))

    def _model(
        self, architecture: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase, base: str
    ) -> PreTrainedModel:
        if architecture is not None:
            try:
                model = tiny_models.build(tiny_models.shrink(architecture), tokenizer, seed=0)
            except Exception as error:  # sizes that do not fit together raise any exception
                self.notes.append(f"{base} cannot be made small ({_first_line(error)})")
            else:
                self.notes.append(f"a tiny {type(model).__name__} with random weights, the architecture of {base}")
                return model
        self.notes.append(f"a tiny Llama with random weights, since the architecture of {base} is not available")
        for key in _OF_ANOTHER_MODEL:
            if self.cfg.get(key) is not None:
                self._put(key, None, "it applies to another architecture", is_exercised=False)
        return tiny_models.build(tiny_models.fallback_architecture(), tokenizer, seed=0)

    def _fit_adapter(self, model: PreTrainedModel) -> None:
        """Adapt LoRA's target modules to the tiny model, and replace the adapter to start from."""
        cfg = self.cfg
        names = [name for name, _ in model.named_modules()]
        targets = cfg.get("lora_target_modules")
        if cfg.get("adapter") and targets and targets != "all-linear" and not _match(targets, names):
            self._put("lora_target_modules", None, "the tiny model has no such modules", is_exercised=False)
            cfg["lora_target_linear"] = True
        kept = cfg.get("lora_modules_to_save")
        if isinstance(kept, list) and (absent := [name for name in kept if not _match([name], names)]):
            present = [name for name in kept if name not in absent] or None
            self._put("lora_modules_to_save", present, "the tiny model has no such modules", is_exercised=False)
        if cfg.get("lora_model_dir"):
            tiny_models.save_adapter(Path(cfg["base_model"]), self.folder / "start", seed=1)
            self._put("lora_model_dir", str(self.folder / "start"), "a random adapter of the tiny model")

    def _put_margins(self, block: MODPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Replace the models of margins by random ones."""
        raw = self.cfg[block.rl]["margins"] if block.margins else {}
        base = Path(self.cfg["base_model"])
        for number, (name, source) in enumerate(block.margins.items()):
            if source.code:
                self.notes.append(f"margin {name}: the code of {source.code}, which runs as in axolotl train")
            given = {key: getattr(source, key) for key in source.model_paths}
            if given and Path(given["path"]).exists():
                source = resolve_source(source, f"`{block.rl}.margins.{name}", self.cfg)
            for key, kind in source.model_paths.items():
                folder = base if kind == "base" else self.folder / f"margin-{number}"
                note = self._stand_in(kind, source, folder, tokenizer, seed=2 + number)
                raw[name] = {**raw[name], key: str(folder)}
                if note:
                    self.notes.append(f"margin {name}: {note.format(given[key])}")

    def _stand_in(
        self, kind: ModelKind, source: RewardSource, folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> str:
        """Save a random model of a kind, and return a note with `{}` for the name of the model it replaces."""
        base = Path(self.cfg["base_model"])
        match kind:
            case "adapter":
                beta = getattr(source, "beta", None)
                tiny_models.save_adapter(base, folder, seed=seed, beta=beta or _UNKNOWN_BETA)
                unknown = (
                    "" if beta else f"; its beta is assumed to be {_UNKNOWN_BETA}, since its mopo.json is not available"
                )
                return f"a random LoRA adapter instead of {{}}{unknown}"
            case "model":
                architecture = tiny_models.load_architecture(str(base), trust=False)
                tiny_models.save(tiny_models.build(architecture, tokenizer, seed), tokenizer, folder)
                return "a random model instead of {}"
            case "classifier":
                labels = _labels(Path(getattr(source, "path", "")), getattr(source, "head", None))
                tiny_models.save_reward_model(folder, tokenizer, labels, seed=seed)
                return "a random tiny reward model instead of {}"
            case _:
                return ""

    def _put_rows(
        self, block: MethodConfig | None, specs: Mapping[str, Sequence[DataSpec]], samples: list[str]
    ) -> None:
        """Replace the data of every entry by a few rows."""
        sections = {section: _entries(self.cfg, section) for section in ("datasets", "test_datasets")}
        if not sections["datasets"]:
            raise ConfigError("`datasets` has no entry; it must be a list of mappings with `path` and `type`")
        for section, entries in sections.items():
            made = []
            for index, entry in enumerate(entries):
                where = f"{section}[{index}]"
                spec = specs[section][index] if section in specs else None
                sample = samples.pop(0) if samples else None
                made.append(self._entry(where, entry, block, spec, sample))
            if made:
                self.cfg[section] = made
        held_out = self.cfg.get("val_set_size")
        if isinstance(held_out, int | float) and held_out > 1:
            self._put("val_set_size", 2, "there are few rows")

    def _entry(
        self,
        where: str,
        entry: Mapping[str, Any],
        block: MethodConfig | None,
        spec: DataSpec | None,
        sample: str | None,
    ) -> dict[str, Any]:
        ratings: Dataset | None = None
        is_joined = bool(entry.get("ratings")) and not Path(str(entry["ratings"])).exists()
        if sample:
            rows, origin = few(sample_rows(sample), spec), f"the first of {sample}"
        elif not is_joined and (found := own_rows(entry)):
            rows, origin = few(found[0], spec), f"the first of {found[1]}"
        else:
            rows, ratings = made_up(entry, block)
            absent = entry["ratings"] if is_joined else entry.get("path")
            origin = f"made up for `type: {entry.get('type')}`, since {absent} is not available"
        self.notes.append(f"{where}: {len(rows)} rows, {origin}")
        name = where.replace("[", "-").rstrip("]")
        made = {key: value for key, value in entry.items() if key not in _DROPPED_OF_ENTRIES}
        if not self.trust:
            made.pop("trust_remote_code", None)
        path = self.folder / f"{name}.parquet"
        rows.to_parquet(path)
        if ratings is not None:
            ratings.to_parquet(self.folder / f"{name}-ratings.parquet")
            made["ratings"] = str(self.folder / f"{name}-ratings.parquet")
            made.pop("ratings_split", None)
        return {**made, "path": str(path), "ds_type": "parquet", "split": "train"}


def _read(config: Path) -> dict[str, Any]:
    cfg = yaml.safe_load(config.read_text(encoding="utf-8"))
    if not isinstance(cfg, dict):
        raise ConfigError("it is not a mapping of keys to values")
    return cfg


def _entries(cfg: Mapping[str, Any], section: str) -> list[dict[str, Any]]:
    entries = cfg.get(section) or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"`{section}` must be a list of mappings with `path` and `type`, not {entries!r:.80}")
    return entries


def _own_settings(raw: MutableMapping[str, Any], block: MethodConfig, folder: Path) -> dict[str, Any]:
    """The method's block with texts instead of template files, and its cache in the folder."""
    made = dict(raw)
    if isinstance(block, PromptSettings) and made.get("directives"):
        texts = made["directives"]
        made["directives"] = {key: getattr(block.directives, key) for key in texts}
    if made.get("cache_dir"):
        made["cache_dir"] = str(folder / "cache")
    return made


def _runs_code(block: MethodConfig | None) -> bool:
    return isinstance(block, MODPOConfig) and any(source.code for source in block.margins.values())


def _is_of_axolotl(plugin: str) -> bool:
    """Whether a plugin is part of Axolotl. Importing it may need a GPU."""
    return plugin.startswith("axolotl.")


def _is_available(source: str, file: str) -> bool:
    """Whether a model's file is in a folder, in the hub's cache, or can be downloaded."""
    if Path(source).exists():
        return (Path(source) / file).exists()
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        return False
    try:
        return isinstance(try_to_load_from_cache(source, file), str) or hub_has(source, "model")
    except ValueError:  # not a valid name on the hub
        return False


def _named_tokens(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Tokens in the configuration, which its tokenizer has or adds."""
    special = cfg.get("special_tokens") or {}
    values = list(special.values()) if isinstance(special, Mapping) else []
    for value in [*values, cfg.get("eot_tokens") or []]:
        for token in [value] if isinstance(value, str) else value:
            yield str(token)


def _labels(folder: Path, head: int | str | None) -> dict[int, str]:
    """The labels of a reward model: its own if it is available, otherwise as many as `head` needs."""
    path = folder / "config.json"
    if path.exists():
        labels = read_record(ModelConfig, path).id2label or {"0": "LABEL_0", "1": "LABEL_1"}
        return {int(index): str(label) for index, label in labels.items()}
    if isinstance(head, str):
        return {0: head}
    return {index: f"LABEL_{index}" for index in range((head or 0) + 1)}


def _match(targets: str | Sequence[str], names: Sequence[str]) -> bool:
    """Whether a module of the model matches the targets, as PEFT reads them."""
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in names)
    return any(name == target or name.endswith(f".{target}") for target in targets for name in names)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


@contextmanager
def _quietly() -> Iterator[None]:
    """Context manager that hides progress bars, and log messages that the training run repeats."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)

"""The entries of `datasets:` and `test_datasets:` that name one of our strategies.

The host drops keys that it does not know from an entry, and names prepared rows after the entry's own keys only. So
what a strategy needs (the entry's keys of ours, the method's settings) is put aside under a key made of its content,
and that key joins the entry's `type`: rows prepared under other settings have another name and are never served.
"""

import hashlib
import json
from collections.abc import MutableMapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from axolotl_mopo.config import AMoPOConfig, Block, ConfigError, Directives, Margin, MODPOConfig, Number, parse_block
from axolotl_mopo.version import __version__

PREFIX = "axolotl_mopo."

_HOST_KEYS = (
    "path",
    "name",
    "split",
    "data_files",
    "revision",
    "ds_type",
    "shards",
    "shards_idx",
    "preprocess_shards",
    "trust_remote_code",
    "type",
)


class PairsOptions(Block):
    """What an entry with `type: axolotl_mopo.pairs` may say besides where its data is."""

    field_prompt: str | None = Field(None, description="the column of the prompt or its messages")
    field_chosen: str = Field("chosen", description="the column of the preferred response")
    field_rejected: str = Field("rejected", description="the column of the other response")
    field_chosen_scores: str | None = Field(None, description="a column, or a pattern such as chosen_{}")
    field_rejected_scores: str | None = Field(None, description="a column, or a pattern such as rejected_{}")
    score_scale: tuple[Number, Number] | None = Field(None, description="[lowest, highest] score of the data set")

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.score_scale and self.score_scale[0] >= self.score_scale[1]:
            raise ValueError(f"score_scale {list(self.score_scale)} must be [lowest, highest]")
        return self


class AMoPOData(BaseModel):
    """What AMoPO's settings mean for the rows."""

    method: Literal["amopo"] = "amopo"
    dimensions: list[str]
    integrated: bool
    score_range: tuple[float, float]
    directives: Directives


class MODPOData(BaseModel):
    """What MODPO's settings mean for the rows; the weights do not matter here, so a sweep shares its prepared rows."""

    method: Literal["modpo"] = "modpo"
    margins: dict[str, Margin]


class DataSpec(BaseModel):
    """Everything that decides how the rows of one data set become training examples."""

    model_config = ConfigDict(frozen=True)

    where: str
    """The entry in the YAML and its path, for messages."""
    strategy: str
    options: PairsOptions
    data: Annotated[AMoPOData | MODPOData, Field(discriminator="method")]
    excess_length_strategy: str
    """The host's own key; the host leaves it out of the name of prepared rows."""
    version: str = __version__

    @property
    def key(self) -> str:
        """A name made of the content."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]


STRATEGY_OPTIONS = {"pairs": PairsOptions}


def bind_entries(cfg: MutableMapping[str, Any], method: str, block: MODPOConfig | AMoPOConfig) -> None:
    """Check every data-set entry and bind it to the settings that its rows depend on, in place.

    Raises:
        ConfigError: naming entry and key.
    """
    if cfg.get("mopo_data") is not None:
        raise ConfigError("`mopo_data` is what the plugin fills in itself; remove it")
    specs: dict[str, Any] = {}
    for section in ("datasets", "test_datasets"):
        entries = cfg.get(section) or []
        if not isinstance(entries, list):
            raise ConfigError(f"`{section}` must be a list of mappings with `path` and `type`, not {entries!r}")
        for index, entry in enumerate(entries):
            where = f"{section}[{index}]"
            if not isinstance(entry, MutableMapping):
                raise ConfigError(f"`{where}` must be a mapping with `path` and `type`, not {entry!r}")
            spec = _spec(cfg, method, block, entry, where)
            specs[spec.key] = spec.model_dump(mode="json")
            for key in spec.options.model_fields_set:
                del entry[key]
            entry["type"] = f"{PREFIX}{spec.strategy}@{spec.key}"
    cfg["mopo_data"] = specs


def _spec(
    cfg: MutableMapping[str, Any],
    method: str,
    block: MODPOConfig | AMoPOConfig,
    entry: MutableMapping[str, Any],
    where: str,
) -> DataSpec:
    known = ", ".join(PREFIX + name for name in STRATEGY_OPTIONS)
    kind = entry.get("type")
    strategy = kind.removeprefix(PREFIX) if isinstance(kind, str) and kind.startswith(PREFIX) else None
    if strategy not in STRATEGY_OPTIONS:
        raise ConfigError(f"`{where}.type` is {kind!r}; with `rl: {method}` it must be one of {known}")
    options = parse_block(
        STRATEGY_OPTIONS[strategy], {key: value for key, value in entry.items() if key not in _HOST_KEYS}, where
    )
    return DataSpec(
        where=f"{where} ({entry.get('path')})",
        strategy=strategy,
        options=options,
        data=_data_settings(block),
        excess_length_strategy=str(cfg.get("excess_length_strategy") or "drop"),
    )


def _data_settings(block: MODPOConfig | AMoPOConfig) -> MODPOData | AMoPOData:
    if isinstance(block, AMoPOConfig):
        return AMoPOData(
            dimensions=block.dimensions,
            integrated=block.integrated,
            score_range=block.score_range,
            directives=block.directives,
        )
    return MODPOData(margins=block.margins)

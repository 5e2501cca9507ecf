"""JSON files that are read back: what they must hold, and where it is wrong. Nothing heavy is imported here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from axolotl_mopo.config import BLOCKS, ConfigError, DimensionsBlock
from axolotl_mopo.files import read_file

MANIFEST = "mopo.json"
ADAPTER = "adapter_config.json"

_LIMIT = 1 << 24
_SHOWN = 60


class Record(BaseModel):
    """What a file holds: no type is converted, NaN and infinity are errors."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


R = TypeVar("R")


class Manifest(Record):
    """`mopo.json`: what a model was trained for."""

    model_config = ConfigDict(extra="allow")

    method: str
    base_model: str | None = None
    beta: Annotated[float, Field(gt=0)] | None = None
    weights: dict[str, float] | None = None
    """Of MODPO's objectives."""

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own."""
        return self.model_extra or {}

    def dimensions_block(self) -> DimensionsBlock | None:
        """What its prompts say, where the method has one for every dimension.

        Raises:
            ValueError: where the settings are not those of such a method.
        """
        block = BLOCKS.get(self.method)
        if block is None or not issubclass(block, DimensionsBlock):
            return None
        names = DimensionsBlock.model_fields
        try:
            return DimensionsBlock.model_validate({key: self.settings[key] for key in names if key in self.settings})
        except ValidationError as error:
            raise ValueError(explain(error).lstrip(",: ")) from None


class AdapterConfig(Record):
    """`adapter_config.json`, as PEFT writes it: what PEFT relies on without looking."""

    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    r: PositiveInt | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    bias: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = None
    layer_replication: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = None
    megatron_config: None = None


class ModelConfig(Record):
    """What is read of a model's `config.json` without loading the model."""

    architectures: list[str] | None = None
    id2label: dict[str, str | int | float] | None = None
    """Indices of its scores and their names."""


def read_record(model: type[R], path: Path) -> R:
    """Read a JSON file that may come from anybody.

    Args:
        model: what it must hold.
        path: of the file.

    Raises:
        ConfigError: naming file and key.
        OSError: where the file cannot be read.
    """
    return parse_record(TypeAdapter(model), read_file(path, _LIMIT), str(path))


def parse_record(adapter: TypeAdapter[R], content: bytes, where: str) -> R:
    """Read JSON.

    Args:
        adapter: of the type that it must hold.
        content: UTF-8.
        where: the file, and the line where it holds one value a line.

    Raises:
        ConfigError: naming `where` and the key.
    """
    try:
        return adapter.validate_json(content)
    except ValidationError as error:
        raise ConfigError(f"{where}{explain(error)}") from None


def explain(error: ValidationError) -> str:
    """What is wrong and at which key; begins with a colon, or with a comma and the key."""
    first, *rest = error.errors(include_url=False, include_context=False)
    more = f" (and {len(rest)} more)" if rest else ""
    if first["type"] == "json_invalid":
        return f": it is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    message = first["msg"][0].lower() + first["msg"][1:]
    found = "" if first["type"] == "missing" else f", not {_shown(first['input'])}"
    key = ".".join(map(str, first["loc"]))[:_SHOWN]
    return (f", `{key if key.isprintable() else ascii(key)}`" if key else "") + f": {message}{found}{more}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

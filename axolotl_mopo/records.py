"""JSON files that are read back: what they must hold, and where it is wrong. Nothing heavy is imported here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.files import read_file

_LIMIT = 1 << 24
_SHOWN = 60


class Record(BaseModel):
    """What a file holds: no type is converted, NaN and infinity are errors."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


R = TypeVar("R")


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

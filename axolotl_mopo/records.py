"""Read and validate JSON files; errors name the file and the key. Imports nothing heavy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.files import read_file

_LIMIT = 1 << 24
_SHOWN = 60


class Record(BaseModel):
    """Schema of a JSON file: no type is converted, and NaN and infinity are errors."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


R = TypeVar("R")


def read_record(model: type[R], path: Path) -> R:
    """Read and validate an untrusted JSON file.

    Args:
        model: type that the file must match.
        path: path of the file.

    Raises:
        ConfigError: if the content does not match; names the file and the key.
        OSError: if the file cannot be read.
    """
    return parse_record(TypeAdapter(model), read_file(path, _LIMIT), str(path))


def parse_record(adapter: TypeAdapter[R], content: bytes, where: str) -> R:
    """Parse and validate JSON.

    Args:
        adapter: adapter of the type that the content must match.
        content: JSON in UTF-8.
        where: the file, and the line in a JSON Lines file, for messages.

    Raises:
        ConfigError: if the content does not match; names `where` and the key.
    """
    try:
        return adapter.validate_json(content)
    except ValidationError as error:
        raise ConfigError(f"{where}{explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Describe a validation error; the text begins with a colon, or with a comma and the key."""
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

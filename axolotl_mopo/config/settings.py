"""The base class of this package's YAML settings, and the texts of their validation errors."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from axolotl_mopo.errors import ConfigError


def number(value: Any) -> Any:
    """Refuse values that pydantic would convert to a number by accident."""
    if isinstance(value, bool):
        raise ValueError("input should be a number, not true or false")
    if isinstance(value, bytes):  # from YAML's !!binary
        raise ValueError("input should be a number, not binary data")
    return value


Number = Annotated[float, BeforeValidator(number)]


class Settings(BaseModel):
    """A mapping in the YAML: unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Keys of older versions and their new names."""

    @classmethod
    def nested(cls, keys: list[Any], raw: Mapping[str, Any]) -> tuple[str, type[BaseModel], list[Any]] | None:
        """The nested settings that an error at `keys` belongs to; None for a key of this class.

        Args:
            keys: path of the error, relative to these settings.
            raw: these settings before validation.

        Returns:
            The path of the nested settings, their class, and the rest of the keys.
        """
        return None


S = TypeVar("S", bound=Settings)


def parse_settings(kind: type[S], raw: Any, path: str, folder: Path | None = None) -> S:
    """Validate a mapping of the YAML.

    Args:
        kind: the class of the settings.
        raw: the mapping.
        path: its key, for messages.
        folder: the folder that must contain the template files the mapping names; None if it must not name any.

    Raises:
        ConfigError: if a key is wrong; one line for each wrong key.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"`{path}` must be a mapping of keys to values, not {raw!r}")
    try:
        return kind.model_validate(dict(raw), context=folder and {"folder": folder})
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, raw, path, dict(details)) for details in error.errors())) from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint with the known name that is closest to a wrong one; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _explain(kind: type[Settings], raw: Mapping[str, Any], path: str, error: dict[str, Any]) -> str:
    fields: type[BaseModel] = kind
    keys = list(error["loc"])
    if keys[-1:] == ["[key]"] and error["type"] != "extra_forbidden":  # pydantic's marker for an invalid key
        keys.pop()
    if inner := kind.nested(keys, raw):
        below, fields, keys = inner
        path = f"{path}.{below}"
    where = "`" + ".".join([path, *map(str, keys)]) + "`"
    field = fields.model_fields.get(str(keys[0])) if keys else None
    expected = f". Meaning: {field.description}" if field and field.description else ""
    match error["type"]:
        case "extra_forbidden" if new := getattr(fields, "renamed", {}).get(str(keys[-1])):
            return f"{where} was renamed to `{new}`; rename the key"
        case "extra_forbidden":
            known = ", ".join(fields.model_fields)
            hint = did_you_mean(str(keys[-1]), fields.model_fields)
            return f"{where} is not a known key{hint}; the known keys are {known}"
        case "missing":
            return f"{where} is missing{expected}"
        case "unknown_source":
            return f"{where} needs a `source`, one of {error['ctx']['known']}, not {error['input']!r}"
        case "value_error":
            return f"{where}: {error['ctx']['error']}"
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            return f"{where}: {message}, not {error['input']!r}{expected}"

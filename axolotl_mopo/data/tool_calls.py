"""Tool calls and tool definitions as they come from files: as JSON text, or in a table that fills gaps with null."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_mopo.errors import RowError


def structured(value: Any, name: str) -> Any:
    """Return what a value of nested lists and mappings holds: the value itself, or what its JSON text says.

    A table stores the keys of all rows in every row and fills the gaps with null, so keys whose value is null are
    removed from it. In JSON text they stay.

    Raises:
        RowError: if a text is not JSON, JSON cannot hold the value, or a text in it is not valid Unicode; the error
            names the column `name`.
    """
    if not isinstance(value, str):
        return _without_nulls(_json_only(value, name))
    if not value.strip():
        return None
    try:
        read = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"its `{name}` is a text that is not JSON: {error}") from None
    return _json_only(read, name)


def _json_only(value: Any, name: str) -> Any:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(
            f"its `{name}` contains a lone surrogate, which is not valid Unicode text; remove it", "invalid text"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(
            f"its `{name}` holds a value that JSON cannot hold ({error}), such as a date that was read from a text; "
            "write the whole column as JSON text"
        ) from None
    return value


def _without_nulls(value: Any) -> Any:
    """Remove the keys whose value is null, at every depth."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the calls of a turn in one form: `type`, `function` with `name` and `arguments`, and `id` if there is one.

    The arguments are a mapping, or JSON text as the model wrote it.

    Raises:
        RowError: if the value is not a list of calls or its JSON text; the error names the column `name`.
    """
    calls = structured(value, f"{name}: tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"the `tool_calls` in its `{name}` must be a list of calls, not {calls!r:.60}")
    return [_call(call, name) for call in calls]


def _call(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    function = raw.get("function", raw)
    called = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments", {}) if isinstance(function, Mapping) else None
    if not isinstance(called, str) or not called or not isinstance(arguments, str | Mapping):
        raise RowError(
            f"a tool call in its `{name}` must have a `name`, and `arguments` that are a mapping or JSON text: "
            f"{dict(raw)!r:.99}"
        )
    if isinstance(arguments, str):
        _json_only(_mapping(arguments), f"{name}: tool_calls")
    identity = {"id": raw["id"]} if raw.get("id") is not None else {}
    return {**identity, "type": "function", "function": {"name": called, "arguments": arguments}}


def with_arguments(call: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    """Return a call with its arguments as JSON text or as a mapping; text that is no JSON object stays as it is."""
    arguments = call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        arguments = _mapping(arguments) or arguments
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _mapping(text: str) -> dict[str, Any] | None:
    """Return the mapping that a JSON text holds; None if it holds something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

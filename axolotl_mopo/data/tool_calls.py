"""Tool calls and tool definitions as they come from files: as JSON text, or in a table that fills gaps with null."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_mopo.errors import RowError


def decoded(value: Any, name: str) -> Any:
    """Decode a value that may be JSON text; an empty text is None.

    Raises:
        RowError: if it is a text that is not JSON; the error names the column `name`.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"its `{name}` is a text that is not JSON: {error}") from None


def json_only(value: Any, name: str) -> Any:
    """Return a value unchanged if JSON can hold it and its texts are valid Unicode.

    Raises:
        RowError: if it cannot, or they are not; the error names the column `name`.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(
            f"its `{name}` contains a lone surrogate, which is not valid Unicode text", "invalid text"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(
            f"its `{name}` holds a value that JSON cannot hold ({error}), such as a date that was read from a text; "
            "write the whole column as JSON text"
        ) from None
    return value


def without_nulls(value: Any) -> Any:
    """Remove the keys whose value is null, at every depth.

    A table stores the keys of all rows in every row and fills the gaps with null. A null that has a meaning must be in
    JSON text.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the calls of a turn in one form: `type`, `function` with `name` and `arguments`, and `id` if there is one.

    The arguments are a mapping, or JSON text as the model wrote it.

    Raises:
        RowError: if the value is not a list of calls or its JSON text; the error names the column `name`.
    """
    in_table = not isinstance(value, str)
    calls = json_only(decoded(value, f"{name}: tool_calls"), f"{name}: tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"the `tool_calls` in its `{name}` must be a list of calls, not {calls!r:.60}")
    return [_call(without_nulls(call) if in_table else call, name) for call in calls]


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
        json_only(_mapping(arguments), f"{name}: tool_calls")
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

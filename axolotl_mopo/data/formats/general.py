"""Pairs of any naming: TRL's and Axolotl's shapes, and the rows that this package writes."""

from collections.abc import Mapping
from typing import Any, cast

from axolotl_mopo.data.options import PairsOptions
from axolotl_mopo.data.reading import Reading
from axolotl_mopo.data.rows import Message, PreferencePair, RatedResponse, Row, RowError, column, messages, score


def read_pair(row: Row, reading: Reading) -> PreferencePair:
    """A prompt or messages, a chosen and a rejected response, and scores, flat or nested.

    A response is a string, a message, or messages that end with it and may begin with the prompt.

    Raises:
        RowError: where a field is missing or has no usable value.
    """
    options = cast(PairsOptions, reading.options)
    before_chosen, chosen = _response(row, options.field_chosen, "field_chosen")
    before_rejected, rejected = _response(row, options.field_rejected, "field_rejected")
    prompt = _prompt(row, options)
    for side, before in ((options.field_chosen, before_chosen), (options.field_rejected, before_rejected)):
        if before and prompt is None:
            prompt = before
        if before and before != prompt:
            raise RowError(
                f"the turns of `{side}` before its last one are not the prompt; both must be the same",
                "two different prompts",
            )
    if prompt is None:
        raise RowError(
            f"it has no prompt: neither a column `prompt` or `messages`, nor turns before the responses; its columns "
            f"are {', '.join(row)}; name the prompt's with field_prompt",
            "missing column",
        )
    return PreferencePair(
        prompt,
        RatedResponse(chosen, _scores(row, options.field_chosen_scores, options.field_chosen)),
        RatedResponse(rejected, _scores(row, options.field_rejected_scores, options.field_rejected)),
    )


def _prompt(row: Row, options: PairsOptions) -> list[Message] | None:
    name = options.field_prompt or next((name for name in ("prompt", "messages") if row.get(name) is not None), None)
    if name is None:
        return None
    return messages(column(row, name, "; name the right one with field_prompt"), name)


def _response(row: Row, name: str, option: str) -> tuple[list[Message], str]:
    """The turns before the response, if the column holds them, and the response's text."""
    value = column(row, name, f"; name the right one with {option}")
    if isinstance(value, str):
        return [], value
    *before, last = messages([value] if isinstance(value, Mapping) else value, name) or [{}]
    if last.get("role") != "assistant":
        raise RowError(f"its `{name}` must end with a turn of role 'assistant', not {last.get('role')!r}")
    return before, last["content"]


def _scores(row: Row, field: str | None, side: str) -> dict[str, float | None]:
    nested_by_default = f"{side}_scores"
    if field is None and nested_by_default not in row:
        # Among chosen_helpfulness and the like there may be a chosen_model: only numbers are scores here.
        return {name: value for name, value in _flat_scores(row, f"{side}_", "").items() if value is not None}
    pattern = field or nested_by_default
    if "{}" in pattern:
        scores = _flat_scores(row, *pattern.split("{}", 1))
        if not scores:
            raise RowError(f"it has no column like `{pattern}`; its columns are {', '.join(row)}", "missing column")
        return scores
    nested: Any = column(row, pattern) if field else row[pattern]
    if nested is not None and not isinstance(nested, Mapping):
        raise RowError(f"its `{pattern}` is no mapping of names to scores, but {type(nested).__name__}")
    return {name: score(value) for name, value in (nested or {}).items()}


def _flat_scores(row: Row, head: str, tail: str) -> dict[str, float | None]:
    return {
        name[len(head) : len(name) - len(tail)]: score(value)
        for name, value in row.items()
        if len(name) > len(head) + len(tail) and name.startswith(head) and name.endswith(tail)
    }

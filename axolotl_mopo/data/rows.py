"""A raw row of preference data -> one canonical pair, or an error that says what is wrong with it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_mopo.data.entries import PairsOptions

Message = dict[str, Any]
"""A turn of a conversation: `role` and `content`, both strings."""


class DataError(ValueError):
    """A row that cannot be trained on; the text names data set and row and says the mend."""


class RowError(ValueError):
    """What is wrong with a row, before it is known where the row stands."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt whose last turn is the user's, and two responses, the first preferred."""

    prompt: list[Message]
    chosen: str
    rejected: str
    chosen_score: Callable[[str], float]
    """The chosen response's score of a name; raises RowError where it has none."""
    rejected_score: Callable[[str], float]


def read_pair(row: Mapping[str, Any], options: PairsOptions) -> PreferencePair:
    """Read a row of the general shape.

    The prompt is a string or messages; a response is a string, a message, or messages that end with it (and may begin
    with the prompt); scores are flat columns or nested mappings.

    Raises:
        RowError: where a field is missing or has no usable value.
    """
    chosen_prompt, chosen = _response(_field(row, options.field_chosen, "field_chosen"), options.field_chosen)
    rejected_prompt, rejected = _response(_field(row, options.field_rejected, "field_rejected"), options.field_rejected)
    prompt = _prompt(row, options)
    for side, own in ((options.field_chosen, chosen_prompt), (options.field_rejected, rejected_prompt)):
        if own and prompt is None:
            prompt = own
        if own and own != prompt:
            raise RowError(f"the turns of `{side}` before its last one are not the prompt; both must be the same")
    if prompt is None:
        raise RowError(
            f"it has no prompt: neither a column `prompt` or `messages`, nor turns before the responses; its columns "
            f"are {', '.join(row)}; name the prompt's with field_prompt"
        )
    if prompt[-1]["role"] != "user":
        raise RowError(f"the prompt ends with a turn of role {prompt[-1]['role']!r}; it must end with the user's")
    return PreferencePair(
        prompt,
        chosen,
        rejected,
        _scores(row, options.field_chosen_scores, options.field_chosen, "field_chosen_scores"),
        _scores(row, options.field_rejected_scores, options.field_rejected, "field_rejected_scores"),
    )


def rescale(score: float, scale: tuple[float, float] | None, score_range: tuple[float, float], name: str) -> float:
    """Map a score from the data set's scale to the one that the directives speak of, linearly.

    Raises:
        RowError: where the score lies outside its scale.
    """
    low, high = scale or score_range
    if not low <= score <= high:
        raise RowError(
            f"its score of {name}, {score:g}, is outside {low:g} to {high:g}; say the data set's own scale with "
            "score_scale: [lowest, highest]"
        )
    return score_range[0] + (score - low) * (score_range[1] - score_range[0]) / (high - low)


def _field(row: Mapping[str, Any], name: str, option: str) -> Any:
    if name not in row:
        raise RowError(f"it has no column `{name}`; its columns are {', '.join(row)}; name the right one with {option}")
    if row[name] is None:
        raise RowError(f"its `{name}` is empty")
    return row[name]


def _prompt(row: Mapping[str, Any], options: PairsOptions) -> list[Message] | None:
    if options.field_prompt:
        name = options.field_prompt
        value = _field(row, name, "field_prompt")
    else:
        name = next((column for column in ("prompt", "messages") if row.get(column) is not None), "")
        if not name:
            return None
        value = row[name]
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else _messages(value, name)
    if not messages or not messages[-1]["content"].strip():
        raise RowError(f"its `{name}` is empty")
    return messages


def _response(value: Any, name: str) -> tuple[list[Message], str]:
    """The turns before the response, if the field holds them, and the response's text."""
    if isinstance(value, str):
        before, text = [], value
    else:
        *before, last = _messages([value] if isinstance(value, Mapping) else value, name) or [{}]
        if last.get("role") != "assistant":
            raise RowError(f"its `{name}` must end with a turn of role 'assistant', not {last.get('role')!r}")
        text = last["content"]
    if not text.strip():
        raise RowError(f"its `{name}` is an empty response; remove the row or give it a text")
    return before, text


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(f"its `{name}` is neither a string nor messages, but {type(value).__name__}")
    messages = []
    for turn in value:
        if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
            raise RowError(f"a turn of its `{name}` lacks a `role` or a `content` that is a string: {dict(turn)!r:.99}")
        # A table stores every key of any row's turns in all of them, as None where a turn has none.
        messages.append({key: entry for key, entry in turn.items() if entry is not None})
    return messages


def _scores(row: Mapping[str, Any], field: str | None, side: str, option: str) -> Callable[[str], float]:
    pattern = field or (f"{side}_scores" if f"{side}_scores" in row else f"{side}_{{}}")

    def score(name: str) -> float:
        column = pattern.replace("{}", name)
        holder, key = (row, column) if "{}" in pattern else (row.get(column), name)
        if not isinstance(holder, Mapping) or key not in holder:
            what = f"no column `{column}`" if "{}" in pattern else f"no `{name}` in `{column}`"
            raise RowError(f"it has {what}; name the scores' column, or a pattern such as {side}_{{}}, with {option}")
        try:
            number = float(holder[key])
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RowError(f"its score of {name} for the {side} response is {holder[key]!r}, not a finite number")
        return number

    return score

"""Pairs with configurable columns: the formats of TRL and Axolotl, and the rows that this package writes."""

from collections.abc import Mapping
from typing import Any, cast

from axolotl_mopo.data.conversations import answer, messages
from axolotl_mopo.data.options import EntryOptions, PairsOptions
from axolotl_mopo.data.rows import Message, PreferencePair, RatedResponse, Row, column, score, text, valid_text
from axolotl_mopo.errors import RowError

_PROMPTS = ("prompt", "messages")
"""Columns that may hold the prompt, in this order."""
_QUESTIONS = ("question", "instruction")
"""Columns that may hold the prompt if neither of `_PROMPTS` does."""
_PARTS = ("input", "history", "tools")
"""Columns that may hold a part of the prompt."""
_SYSTEMS = ("system", "system_prompt", "system_message")
"""Columns that may hold the system message; the first is read by default."""
_NOTHING: tuple[object, ...] = (None, "", [], {}, "[]", "{}", "null")


def read_pair(row: Row, options: EntryOptions) -> PreferencePair:
    """Read a prompt or messages, a chosen and a rejected response, and scores, flat or nested.

    A response is a string, a message, or messages that end with it and may begin with the prompt. A system message may
    have a separate column.

    Raises:
        RowError: if a field is missing or has no usable value.
    """
    options = cast(PairsOptions, options)
    before_chosen, chosen = _response(row, options.field_chosen, "field_chosen")
    before_rejected, rejected = _response(row, options.field_rejected, "field_rejected")
    name = options.field_prompt or _prompt_column(row, with_questions=not (before_chosen or before_rejected))
    prompt = None if name is None else column(row, name, "; name the right one with field_prompt")
    turns = None if name is None else messages(prompt, name)
    for side, before in ((options.field_chosen, before_chosen), (options.field_rejected, before_rejected)):
        if before and (turns is None or (isinstance(prompt, str) and _is_asked_in(prompt, before))):
            turns, prompt = before, None
        if before and before != turns:
            raise RowError(
                f"the turns of `{side}` before its last one differ from the prompt; both must be the same",
                "two different prompts",
            )
    if turns is None:
        raise RowError(
            f"it has no prompt: no column {' or '.join(f'`{known}`' for known in _PROMPTS + _QUESTIONS)}, and no turns "
            f"before the responses; its columns are {', '.join(row)}; name the prompt column with field_prompt",
            "missing column",
        )
    return PreferencePair(
        _with_system(turns, _system(row, options)),
        RatedResponse(chosen, _scores(row, options.field_chosen_scores, options.field_chosen)),
        RatedResponse(rejected, _scores(row, options.field_rejected_scores, options.field_rejected)),
    )


def _prompt_column(row: Row, with_questions: bool) -> str | None:
    found = [name for name in _PROMPTS if row.get(name) is not None][:1]
    if not found and with_questions:
        found = [name for name in _QUESTIONS if row.get(name) is not None]
    # If another column holds a part of the prompt, that part would be lost.
    others = [*found[1:], *(name for name in _PARTS if found and row.get(name) not in _NOTHING)]
    if any(row[name] != row[found[0]] for name in others):
        raise RowError(
            f"its prompt may be in {' or '.join(f'`{name}`' for name in [found[0], *others])}; name its column with "
            "field_prompt",
            "more than one prompt",
        )
    return found[0] if found else None


def _is_asked_in(question: str, turns: list[Message]) -> bool:
    """Whether a prompt that is a string equals the first or the last user turn."""
    asked = [turn["content"].strip() for turn in turns if turn["role"] == "user"]
    return question.strip() in (asked[:1] + asked[-1:])


def _system(row: Row, options: PairsOptions) -> str:
    """Return the system message in a separate column; an empty string if there is none."""
    if options.field_system is None:
        value, *others = (row.get(name) for name in _SYSTEMS)
        if any(other not in _NOTHING for other in others) or not isinstance(value, str | None):
            raise RowError(
                f"its system message may be in {' or '.join(f'`{name}`' for name in _SYSTEMS if row.get(name))}, but "
                "only a text in `system` is read by default; name its column with field_system",
                "system message elsewhere",
            )
        return valid_text(value or "", "system")
    if options.field_system in row and row[options.field_system] is None:
        return ""
    return text(row, options.field_system, "; name the right one with field_system")


def _with_system(prompt: list[Message], system: str) -> list[Message]:
    if not system.strip():
        return prompt
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() != system.strip():
            raise RowError(
                "its prompt begins with a system message other than the one in the system column; keep one of them",
                "two system messages",
            )
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def _response(row: Row, name: str, option: str) -> tuple[list[Message], str]:
    """Return the turns before the response, if the column holds them, and the response's text."""
    value = column(row, name, f"; name the right one with {option}")
    if isinstance(value, str):
        return [], valid_text(value, name)
    *before, last = messages([value] if isinstance(value, Mapping) else value, name) or [{}]
    if last.get("role") != "assistant":
        raise RowError(f"its `{name}` must end with a turn of role 'assistant', not {last.get('role')!r}")
    return before, answer(last, name)


def _scores(row: Row, field: str | None, side: str) -> dict[str, float | None]:
    nested_by_default = f"{side}_scores"
    if field is None and nested_by_default not in row:
        # Columns such as chosen_model match the pattern too, so only numbers count as scores here.
        flat: dict[str, float | None] = {
            name: value for name, value in _flat_scores(row, f"{side}_", "").items() if value is not None
        }
        return _with_overall(flat, row, side)
    pattern = field or nested_by_default
    if "{}" in pattern:
        scores = _flat_scores(row, *pattern.split("{}", 1))
        if not scores:
            raise RowError(f"it has no column like `{pattern}`; its columns are {', '.join(row)}", "missing column")
        return scores
    nested: Any = column(row, pattern) if field else row[pattern]
    if nested is not None and not isinstance(nested, Mapping):
        raise RowError(f"its `{pattern}` must be a mapping of names to scores, not {type(nested).__name__}")
    return {name: score(value) for name, value in (nested or {}).items()}


def _with_overall(scores: dict[str, float | None], row: Row, side: str) -> dict[str, float | None]:
    """Add the score in a column such as `score_chosen` under the name `score`."""
    value = score(row.get(f"score_{side}"))
    if value is None:
        return scores
    if scores.get("score", value) != value:
        raise RowError(
            f"its `score_{side}` and its `{side}_score` are two different scores; name one of them with "
            "field_chosen_scores and field_rejected_scores",
            "two different scores",
        )
    return scores | {"score": value}


def _flat_scores(row: Row, head: str, tail: str) -> dict[str, float | None]:
    return {
        name[len(head) : len(name) - len(tail)]: score(value)
        for name, value in row.items()
        if len(name) > len(head) + len(tail) and name.startswith(head) and name.endswith(tail)
    }

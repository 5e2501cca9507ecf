"""Pairs with configurable columns: the formats of TRL and Axolotl, and the rows that this package writes."""

from collections.abc import Mapping
from typing import Any, cast

from axolotl_mopo.data.conversations import check_answered, messages, response, template_inputs, user
from axolotl_mopo.data.options import EntryOptions, PairsOptions
from axolotl_mopo.data.rows import Message, PreferencePair, Row, column, score, text, valid_text
from axolotl_mopo.errors import RowError

_PROMPTS = ("prompt", "messages")
"""Columns that may hold the prompt, in this order."""
_QUESTIONS = ("question", "instruction")
"""Columns that may hold the prompt if neither of `_PROMPTS` does."""
_PARTS = ("input", "history")
"""Columns that may hold a part of the prompt."""
_SYSTEMS = ("system", "system_prompt", "system_message")
"""Columns that may hold the system message; the first is read by default."""
_NOTHING: tuple[object, ...] = (None, "", [], {}, "[]", "{}", "null")


def read_pair(row: Row, options: EntryOptions) -> PreferencePair:
    """Read a prompt or messages, a chosen and a rejected response, and scores, flat or nested.

    A response is a string, a message, or messages that end with an assistant turn and may begin with the prompt. What
    both responses have in common before an assistant turn is the prompt. A system message, the `tools` and the
    `chat_template_kwargs` may have separate columns.

    Raises:
        RowError: if a field is missing or has no usable value.
    """
    options = cast(PairsOptions, options)
    chosen, rejected = (
        _turns(row, options.field_chosen, "field_chosen"),
        _turns(row, options.field_rejected, "field_rejected"),
    )
    name = options.field_prompt or _prompt_column(row, with_questions=not (_asks(chosen) or _asks(rejected)))
    prompt = None if name is None else column(row, name, "; name the right one with field_prompt")
    turns = None if name is None else messages(prompt, name)
    if prompt is None or isinstance(prompt, str):
        shared = _prompt_of(chosen, rejected, options)
        if shared and (prompt is None or _is_asked_in(prompt, shared)):
            turns = shared
    if turns is None:
        raise RowError(
            f"it has no prompt: no column {' or '.join(f'`{known}`' for known in _PROMPTS + _QUESTIONS)}, and no turns "
            f"before the responses; its columns are {', '.join(row)}; name the prompt column with field_prompt",
            "missing column",
        )
    chosen_scores = _scores(row, options.field_chosen_scores, options.field_chosen)
    rejected_scores = _scores(row, options.field_rejected_scores, options.field_rejected)
    return PreferencePair(
        _with_system(turns, _system(row, options)),
        response(_after(turns, chosen, options.field_chosen), options.field_chosen, chosen_scores),
        response(_after(turns, rejected, options.field_rejected), options.field_rejected, rejected_scores),
        template_inputs(row),
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


def _turns(row: Row, name: str, option: str) -> list[Message]:
    """Return the turns in the column of a response, which may begin with the prompt and end with the assistant's."""
    value = column(row, name, f"; name the right one with {option}")
    turns = messages([value] if isinstance(value, Mapping) else value, name)
    if isinstance(value, str) and turns == user(value):  # a text, not the JSON text of messages
        return [{"role": "assistant", "content": value}]
    check_answered(turns, name)
    return turns


def _prompt_of(chosen: list[Message], rejected: list[Message], options: PairsOptions) -> list[Message]:
    """Return the prompt that the columns of the responses begin with; empty if none of them has one.

    If both have it, it is what they share before an assistant turn.

    Raises:
        RowError: if they begin with two different prompts.
    """
    with_prompt = [turns for turns in (chosen, rejected) if _asks(turns)]
    if len(with_prompt) < 2:
        return with_prompt[0][:-1] if with_prompt else []
    together = 0
    for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one["role"] == other["role"] == "assistant":
            together = index
        if one == other:
            continue
        if {one["role"], other["role"]} & {"user", "system"}:
            raise _two_prompts(options.field_rejected)
        break
    return chosen[:together]


def _asks(turns: list[Message]) -> bool:
    return any(turn["role"] in ("user", "system") for turn in turns)


def _after(prompt: list[Message], turns: list[Message], name: str) -> list[Message]:
    """Return the turns of a response without the prompt that they may begin with.

    Raises:
        RowError: if they begin with another prompt.
    """
    rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if not rest or rest[0]["role"] != "assistant":
        raise _two_prompts(name)
    return rest


def _two_prompts(name: str) -> RowError:
    return RowError(
        f"the turns of `{name}` before its last one differ from the prompt; both must be the same",
        "two different prompts",
    )


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

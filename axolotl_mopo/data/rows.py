"""The canonical row, a preference pair with its scores, and checks of raw rows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from axolotl_mopo.data.tool_calls import with_arguments
from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import RowError

Message = dict[str, Any]
"""A turn of a conversation, with all that a chat template may read.

`role` is a string; `content` a string, or None for a turn that only calls tools. An assistant turn may have
`reasoning_content` and `tool_calls`, a tool's turn `tool_call_id` and `name`.
"""

Row = Mapping[str, Any]
"""A row of a raw data set: column name to value."""


@dataclass(frozen=True)
class RatedResponse:
    """A response and its scores on the data set's own scale. None marks a score that is not a finite number."""

    text: str
    """The content of its last turn, without reasoning."""
    scores: Mapping[str, float | None]
    turns: Sequence[Message] = ()
    """All its turns if it is more than a text (reasoning, tool calls, several turns); empty for a text alone."""

    @property
    def messages(self) -> list[Message]:
        """Its turns; the last one is the assistant's."""
        return list(self.turns) or [{"role": "assistant", "content": self.text}]

    @property
    def content(self) -> str | list[Message]:
        """What two responses to one prompt are compared by, and what a canonical row holds."""
        return list(self.turns) or self.text

    def differs_from(self, other: Self) -> bool:
        """Whether the two responses say something else, whatever the whitespace around texts and the ids of calls."""
        return list(map(_said, self.messages)) != list(map(_said, other.messages))

    def score(self, name: str) -> float:
        """Return the score called `name`.

        Raises:
            RowError: if the response has no such score.
        """
        value = self.scores.get(name)
        if value is None:
            raise RowError(f"a response has no usable score of {name}", "missing score")
        return value


def _said(turn: Message) -> list[Any]:
    """Return what a turn says: its role, its texts, and the names and arguments of its calls."""
    calls = [with_arguments(call, as_text=False)["function"] for call in turn.get("tool_calls", ())]
    return [turn["role"], (turn["content"] or "").strip(), turn.get("reasoning_content", "").strip(), calls]


@dataclass(frozen=True)
class TemplateInputs:
    """What a chat template reads of a row besides the messages."""

    tools: Sequence[Mapping[str, Any]] = ()
    """Definitions of the functions that the model may call."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, such as `enable_thinking`."""

    def to_row(self) -> dict[str, Any]:
        """Return the columns of a canonical row; none if there is nothing to read."""
        row = {"tools": list(self.tools), "chat_template_kwargs": dict(self.kwargs)}
        return {name: value for name, value in row.items() if value}


NO_INPUTS = TemplateInputs()


def prompt_content(prompt: Sequence[Message], inputs: TemplateInputs = NO_INPUTS) -> Any:
    """Return what makes two prompts the same: the messages, and what else the chat template reads, if anything."""
    asked = inputs.to_row()
    return [prompt, asked] if asked else prompt


@dataclass(frozen=True)
class PreferencePair:
    """A prompt that ends with a user's or a tool's turn, and two responses to it."""

    prompt: list[Message]
    chosen: RatedResponse
    rejected: RatedResponse
    inputs: TemplateInputs = NO_INPUTS

    def to_row(self) -> dict[str, Any]:
        """Return the canonical row: the form in JSONL and Parquet files, which the strategy `pairs` reads."""
        return {
            "prompt": self.prompt,
            "chosen": self.chosen.content,
            "rejected": self.rejected.content,
            "chosen_scores": dict(self.chosen.scores),
            "rejected_scores": dict(self.rejected.scores),
            **self.inputs.to_row(),
        }

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return the pair in a canonical row."""
        chosen, rejected = (_response(row[side], row[f"{side}_scores"]) for side in ("chosen", "rejected"))
        inputs = TemplateInputs(row.get("tools", ()), row.get("chat_template_kwargs", {}))
        return cls(row["prompt"], chosen, rejected, inputs)

    @property
    def prompt_key(self) -> int:
        """A 63-bit number that pairs of the same prompt share."""
        return fingerprint(prompt_content(self.prompt, self.inputs))


def _response(content: str | list[Message], scores: Mapping[str, float | None]) -> RatedResponse:
    if isinstance(content, str):
        return RatedResponse(content, scores)
    return RatedResponse(content[-1]["content"] or "", scores, content)


def check_pair(pair: PreferencePair) -> None:
    """Check what every pair must have, whatever its source.

    Raises:
        RowError: if the prompt does not end with a user's or a tool's turn, a response is empty, or both responses
            are the same.
    """
    check_prompt(pair.prompt)
    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        check_response(response, side)
    if not pair.chosen.differs_from(pair.rejected):
        raise RowError("its chosen and rejected responses are the same text", "identical responses")


def check_prompt(prompt: list[Message]) -> None:
    """Check that a prompt ends with a question of the user, or with the result of a tool.

    Raises:
        RowError: if it is empty, has no user turn, ends with another turn, or has a turn that is not valid Unicode
            text.
    """
    if not prompt:
        raise RowError("its prompt is empty", "empty prompt")
    last = prompt[-1]
    if last["role"] == "tool" and any(turn["role"] == "user" for turn in prompt):
        pass  # a tool may have nothing to report
    elif last["role"] != "user":
        raise RowError(f"its prompt ends with a turn of role {last['role']!r}; it must end with a user turn")
    elif not last["content"].strip():
        raise RowError("its prompt is empty", "empty prompt")
    for each in texts_of(prompt):
        valid_text(each, "prompt")


def texts_of(turns: Iterable[Message]) -> Iterable[str]:
    """Yield the texts in some turns: contents and reasoning."""
    return (turn[key] for turn in turns for key in ("content", "reasoning_content") if turn.get(key))


def check_response(response: RatedResponse, name: str) -> None:
    """Check that a response ends with a text or a tool call, and that it is valid Unicode.

    Raises:
        RowError: if it does not; the error names the column `name`.
    """
    last = response.messages[-1]
    if not response.text.strip() and not last.get("tool_calls"):
        raise RowError(f"its `{name}` is an empty response", "empty response")
    for each in texts_of(response.messages):
        valid_text(each, name)


def is_text(turn: Message) -> bool:
    """Whether a turn is a role and a text, and nothing else."""
    return turn.keys() == {"role", "content"} and isinstance(turn["content"], str)


def valid_text(content: str, name: str) -> str:
    """Return a text of the column `name` unchanged.

    A lone surrogate, such as "\\ud800" in JSON, makes the tokenizer fail.

    Raises:
        RowError: if the text contains a lone surrogate.
    """
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"its `{name}` contains the lone surrogate {content[error.start]!a}, which is not valid Unicode text; "
            "remove it, or replace it with '\\ufffd'",
            "invalid text",
        ) from None
    return content


def column(row: Row, name: str, hint: str = "") -> Any:
    """Return the value of a column that must exist and must not be empty.

    Raises:
        RowError: if it does not exist or is empty; `hint` says how to fix a missing column.
    """
    if name not in row:
        raise RowError(f"it has no column `{name}`; its columns are {', '.join(row)}{hint}", "missing column")
    if row[name] is None:
        raise RowError(f"its `{name}` is empty", "empty column")
    return row[name]


def text(row: Row, name: str, hint: str = "") -> str:
    """Return the string in a column; `hint` says how to fix a missing column.

    Raises:
        RowError: if the column is missing, is not a string, or is not valid Unicode text.
    """
    value = column(row, name, hint)
    if not isinstance(value, str):
        raise RowError(f"its `{name}` must be a string, not {type(value).__name__}")
    return valid_text(value, name)


def score(value: Any) -> float | None:
    """Convert a number or a string to a score; None if it is neither or not finite, such as "N/A"."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def choice(row: Row, name: str, first: Any, second: Any) -> bool:
    """Whether a label column is `first` and not `second`.

    Raises:
        RowError: if it is neither.
    """
    value = column(row, name)
    if value not in (first, second):
        raise RowError(f"its `{name}` is {value!r}; it must be {first!r} or {second!r}", "unknown label")
    return value == first


def rescale(value: float, scale: tuple[float, float], score_range: tuple[float, float], name: str) -> float:
    """Map a score linearly from the data set's scale to the one that the directives use.

    Raises:
        RowError: if the score is outside its scale.
    """
    low, high = scale
    if not low <= value <= high:
        raise RowError(
            f"its score of {name}, {value:g}, is outside {low:g} to {high:g}; set the data set's own scale with "
            "score_scale: [lowest, highest]",
            "score outside its scale",
        )
    return score_range[0] + (value - low) * (score_range[1] - score_range[0]) / (high - low)

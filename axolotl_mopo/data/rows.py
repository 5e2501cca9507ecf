"""The canonical row, a preference pair with its scores, and what can be wrong with a raw one."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

Message = dict[str, Any]
"""A turn of a conversation: `role` and `content`, both strings."""

Row = Mapping[str, Any]
"""A row of a raw data set: column name to value."""


class DataError(ValueError):
    """Data that cannot be trained on; the text names data set and row and says the mend."""


class RowError(ValueError):
    """What is wrong with a row, before it is known where the row stands.

    Args:
        message: the fault and its mend.
        kind: the fault in two or three words, by which dropped rows are counted.
    """

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class RatedResponse:
    """A response and its scores on the data set's own scale; None stands for a score that is no number."""

    text: str
    scores: Mapping[str, float | None]

    def score(self, name: str) -> float:
        """The score of a name.

        Raises:
            RowError: where there is none.
        """
        value = self.scores.get(name)
        if value is None:
            raise RowError(f"a response has no usable score of {name}", "missing score")
        return value


@dataclass(frozen=True)
class PreferencePair:
    """A prompt whose last turn is the user's, and two responses to it."""

    prompt: list[Message]
    chosen: RatedResponse
    rejected: RatedResponse

    def to_row(self) -> dict[str, Any]:
        """The canonical row, as JSONL and Parquet files hold it and the strategy `pairs` reads it."""
        return {
            "prompt": self.prompt,
            "chosen": self.chosen.text,
            "rejected": self.rejected.text,
            "chosen_scores": dict(self.chosen.scores),
            "rejected_scores": dict(self.rejected.scores),
        }

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """The pair of a canonical row."""
        chosen = RatedResponse(row["chosen"], row["chosen_scores"])
        return cls(row["prompt"], chosen, RatedResponse(row["rejected"], row["rejected_scores"]))

    @property
    def prompt_key(self) -> int:
        """A 63-bit number that pairs of the same prompt share."""
        return fingerprint(self.prompt)


def fingerprint(value: Any) -> int:
    """A 63-bit number made of a JSON-like value, where a date counts as its text; the same on every machine."""
    digest = hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_pair(pair: PreferencePair) -> None:
    """Hold what every pair must have, whatever its source.

    Raises:
        RowError: where the prompt does not end with the user's turn, or a text is empty, or both responses are one.
    """
    check_prompt(pair.prompt)
    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        check_response(response, side)
    if pair.chosen.text.strip() == pair.rejected.text.strip():
        raise RowError("its chosen and rejected responses are the same text", "identical responses")


def check_prompt(prompt: list[Message]) -> None:
    """Refuse a prompt that asks nothing.

    Raises:
        RowError: where it is empty, its last turn is not the user's, or a turn is not valid Unicode text.
    """
    if not prompt or not prompt[-1]["content"].strip():
        raise RowError("its prompt is empty", "empty prompt")
    if prompt[-1]["role"] != "user":
        raise RowError(f"the prompt ends with a turn of role {prompt[-1]['role']!r}; it must end with the user's")
    for turn in prompt:
        valid_text(turn["content"], "prompt")


def check_response(response: RatedResponse, name: str) -> None:
    """Refuse a response without a text, or with one that is not valid Unicode.

    Raises:
        RowError: naming it.
    """
    if not response.text.strip():
        raise RowError(f"its `{name}` is an empty response", "empty response")
    valid_text(response.text, name)


def valid_text(content: str, name: str) -> str:
    """A text of the column `name`, unchanged. A lone surrogate, as "\\ud800" in JSON gives one, breaks the tokenizer.

    Raises:
        RowError: where there is one.
    """
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"its `{name}` holds the lone surrogate {content[error.start]!a}, which is not valid Unicode text; remove "
            "it, or replace it with '\\ufffd'",
            "invalid text",
        ) from None
    return content


def column(row: Row, name: str, hint: str = "") -> Any:
    """The value of a column that must be there and hold something.

    Raises:
        RowError: naming the column, with `hint` as the mend.
    """
    if name not in row:
        raise RowError(f"it has no column `{name}`; its columns are {', '.join(row)}{hint}", "missing column")
    if row[name] is None:
        raise RowError(f"its `{name}` is empty", "empty column")
    return row[name]


def text(row: Row, name: str, hint: str = "") -> str:
    """The string in a column; `hint` says how to fix a column that is missing.

    Raises:
        RowError: where there is none, or it is not valid Unicode text.
    """
    value = column(row, name, hint)
    if not isinstance(value, str):
        raise RowError(f"its `{name}` is no string, but {type(value).__name__}")
    return valid_text(value, name)


def user(content: str) -> list[Message]:
    """A conversation of one turn, the user's."""
    return [{"role": "user", "content": content}]


def messages(value: Any, name: str) -> list[Message]:
    """The turns in a column that holds a string or messages.

    A turn has `role` and `content`, or ShareGPT's `from` and `value`. A content is a string or a list of text parts.

    Raises:
        RowError: where it holds neither, or a text is not valid Unicode.
    """
    if isinstance(value, str):
        return user(valid_text(value, name))
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(f"its `{name}` is neither a string nor messages, but {type(value).__name__}")
    return [_turn(turn, name) for turn in value]


_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"
)


_SHAREGPT_NAMES = ("human", "gpt", "chatgpt", "bing", "bard")
"""Roles that no chat template means by these words."""
_UNTRAINED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What a turn may hold beside its content."""


def answer(turn: Message, name: str) -> str:
    """What the last turn in a column says.

    Raises:
        RowError: where it holds something else as well, which would not be trained on.
    """
    if kept := [key for key in _UNTRAINED if turn.get(key)]:
        raise RowError(
            f"the response in its `{name}` has `{kept[0]}`, which would be left out, as only its content is trained "
            "on; write what matters there, or leave such rows out",
            "response that is more than a text",
        )
    content: str = turn["content"]
    return content


def _turn(raw: Mapping[str, Any], name: str) -> Message:
    # A table stores every key of any row's turns in all of them, as None where a turn has none.
    turn = {key: value for key, value in raw.items() if value is not None}
    if "role" not in turn and "from" in turn:
        turn = _from_sharegpt(turn, name)
    elif turn.get("role") in _SHAREGPT_NAMES:
        turn["role"] = _SHAREGPT_ROLES[turn["role"]]
    if isinstance(turn.get("content"), list):
        turn["content"] = _joined_parts(turn["content"], name)
    if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        raise RowError(f"a turn of its `{name}` lacks a `role` or a `content` that is a string: {dict(raw)!r:.99}")
    # What was text in a file may have become a date.
    written = json.dumps(turn, default=str, ensure_ascii=False)
    return json.loads(valid_text(written, name))


def _from_sharegpt(turn: Message, name: str) -> Message:
    role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise RowError(
            f"a turn of its `{name}` is from {turn['from']!r:.40}; known are {', '.join(_SHAREGPT_ROLES)}",
            "unknown role",
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return rest | {"role": role} | ({"content": turn["value"]} if "value" in turn else {})


def _joined_parts(parts: Sequence[Any], name: str) -> str:
    """The text of a content that is a list of parts."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f"a turn of its `{name}` holds a part of type {kind!r:.40} that is not a text; only texts are trained "
                "on",
                "content that is not text",
            )
        texts.append(part["text"])
    return "".join(texts)


def score(value: Any) -> float | None:
    """A score as a float, from a number or a string; None where it is neither, or not finite, as for "N/A"."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def choice(row: Row, name: str, first: Any, second: Any) -> bool:
    """Whether a label column says `first` and not `second`.

    Raises:
        RowError: where it says neither.
    """
    value = column(row, name)
    if value not in (first, second):
        raise RowError(f"its `{name}` is {value!r}; it must be {first!r} or {second!r}", "unknown label")
    return value == first


def rescale(value: float, scale: tuple[float, float], score_range: tuple[float, float], name: str) -> float:
    """Map a score from the data set's scale to the one that the directives speak of, linearly.

    Raises:
        RowError: where the score lies outside its scale.
    """
    low, high = scale
    if not low <= value <= high:
        raise RowError(
            f"its score of {name}, {value:g}, is outside {low:g} to {high:g}; say the data set's own scale with "
            "score_scale: [lowest, highest]",
            "score outside its scale",
        )
    return score_range[0] + (value - low) * (score_range[1] - score_range[0]) / (high - low)

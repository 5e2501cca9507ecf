"""The canonical row, a preference pair with its scores, and checks of raw rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import RowError

Message = dict[str, Any]
"""A turn of a conversation: `role` and `content`, both strings."""

Row = Mapping[str, Any]
"""A row of a raw data set: column name to value."""


@dataclass(frozen=True)
class RatedResponse:
    """A response and its scores on the data set's own scale. None marks a score that is not a finite number."""

    text: str
    scores: Mapping[str, float | None]

    def score(self, name: str) -> float:
        """Return the score called `name`.

        Raises:
            RowError: if the response has no such score.
        """
        value = self.scores.get(name)
        if value is None:
            raise RowError(f"a response has no usable score of {name}", "missing score")
        return value


@dataclass(frozen=True)
class PreferencePair:
    """A prompt that ends with a user turn, and two responses to it."""

    prompt: list[Message]
    chosen: RatedResponse
    rejected: RatedResponse

    def to_row(self) -> dict[str, Any]:
        """Return the canonical row: the form in JSONL and Parquet files, which the strategy `pairs` reads."""
        return {
            "prompt": self.prompt,
            "chosen": self.chosen.text,
            "rejected": self.rejected.text,
            "chosen_scores": dict(self.chosen.scores),
            "rejected_scores": dict(self.rejected.scores),
        }

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return the pair in a canonical row."""
        chosen = RatedResponse(row["chosen"], row["chosen_scores"])
        return cls(row["prompt"], chosen, RatedResponse(row["rejected"], row["rejected_scores"]))

    @property
    def prompt_key(self) -> int:
        """A 63-bit number that pairs of the same prompt share."""
        return fingerprint(self.prompt)


def check_pair(pair: PreferencePair) -> None:
    """Check what every pair must have, whatever its source.

    Raises:
        RowError: if the prompt does not end with a user turn, a text is empty, or both responses are the same text.
    """
    check_prompt(pair.prompt)
    for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        check_response(response, side)
    if pair.chosen.text.strip() == pair.rejected.text.strip():
        raise RowError("its chosen and rejected responses are the same text", "identical responses")


def check_prompt(prompt: list[Message]) -> None:
    """Check that a prompt ends with a question of the user.

    Raises:
        RowError: if it is empty, does not end with a user turn, or has a turn that is not valid Unicode text.
    """
    if not prompt or not prompt[-1]["content"].strip():
        raise RowError("its prompt is empty", "empty prompt")
    if prompt[-1]["role"] != "user":
        raise RowError(f"its prompt ends with a turn of role {prompt[-1]['role']!r}; it must end with a user turn")
    for turn in prompt:
        valid_text(turn["content"], "prompt")


def check_response(response: RatedResponse, name: str) -> None:
    """Check that a response has a text and that it is valid Unicode.

    Raises:
        RowError: if it has none or is not; the error names the column `name`.
    """
    if not response.text.strip():
        raise RowError(f"its `{name}` is an empty response", "empty response")
    valid_text(response.text, name)


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

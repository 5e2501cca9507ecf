"""The canonical row, a preference pair with its scores, and what can be wrong with a raw one."""

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
        RowError: naming the column; `hint` says how to fix it.
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

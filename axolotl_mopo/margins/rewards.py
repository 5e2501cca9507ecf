"""Margin rewards that the row itself decides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

from axolotl_mopo.config import ColumnMargin, LengthMargin, Margin


@dataclass(frozen=True)
class Response:
    """One response of a pair, as a margin reward sees it."""

    text: str
    tokens: int
    """Tokens of the completion, its end-of-turn token included."""
    score: Callable[[str], float]
    """The data set's score of a name; raises where the row has none."""


class MarginReward(Protocol):
    """A reward r_j(x, y); only its difference between chosen and rejected enters the loss, but on its own scale."""

    def __call__(self, response: Response) -> float:
        """The reward of one response."""
        ...


@dataclass(frozen=True)
class ColumnReward:
    """A score that the data set holds for both responses."""

    field: str

    def __call__(self, response: Response) -> float:
        """The score, as it stands in the data set."""
        return response.score(self.field)


@dataclass(frozen=True)
class LengthReward:
    """Minus one for every unit of the response's length (the length penalty of arXiv 2310.03708's released code)."""

    unit: Literal["tokens", "words", "characters"]

    def __call__(self, response: Response) -> float:
        """Minus the number of units."""
        match self.unit:
            case "tokens":
                return -float(response.tokens)
            case "words":
                return -float(len(response.text.split()))
            case "characters":
                return -float(len(response.text))
            case _:
                assert_never(self.unit)


def build_margin(name: str, margin: Margin) -> MarginReward:
    """The reward that an entry of `modpo.margins` describes."""
    match margin:
        case ColumnMargin():
            return ColumnReward(margin.field or name)
        case LengthMargin():
            return LengthReward(margin.unit)
        case _:
            assert_never(margin)

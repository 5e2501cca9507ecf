"""A source of rewards: answers that do not repeat themselves."""

from typing import Literal

from pydantic import Field

from axolotl_mopo.config import SOURCES
from axolotl_mopo.rewards import TextSource


class FreshSource(TextSource):
    """The share of a response's runs of n words that it has not said before."""

    source: Literal["fresh"]
    n: int = Field(3, ge=1, description="words in a run, at least 1")

    def compute(self, prompts: list[list[dict]], responses: list[str]) -> list[float]:
        """One reward for each response."""
        return [self._fresh(response.lower().split()) for response in responses]

    def _fresh(self, words: list[str]) -> float:
        runs = [tuple(words[start : start + self.n]) for start in range(len(words) - self.n + 1)]
        return len(set(runs)) / len(runs) if runs else 1.0


SOURCES["fresh"] = FreshSource

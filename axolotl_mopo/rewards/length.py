"""`source: length`: the shorter the response, the higher the reward."""

from typing import ClassVar, Literal

from pydantic import Field

from axolotl_mopo.config.sources import RatedText, RewardSource


class LengthSource(RewardSource):
    """The reward is the negated number of tokens, words or characters of the response.

    This is the length penalty of the code released with arXiv 2310.03708.
    """

    source: Literal["length"]
    unit: Literal["tokens", "words", "characters"] = Field(
        "tokens",
        description="Unit of the length: one of tokens, words, characters. The reward is the negated length.",
    )

    argument: ClassVar = "unit"
    in_rows: ClassVar = True
    negated: ClassVar = "the length"

    def row_reward(self, margin: str, response: RatedText, tokens: int) -> float:
        """See `RewardSource`."""
        lengths = {"tokens": tokens, "words": len(response.text.split()), "characters": len(response.text)}
        return -float(lengths[self.unit])

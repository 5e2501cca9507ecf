"""`source: column`: a score in the data set."""

from typing import ClassVar, Literal

from pydantic import Field

from axolotl_mopo.config.sources import RatedText, RewardSource


class ColumnSource(RewardSource):
    """The reward is a score that the data set has for both responses."""

    source: Literal["column"]
    field: str | None = Field(None, description="Name of the score in the data set. Default: the name of the margin.")

    in_rows: ClassVar = True
    needs_scores: ClassVar = True

    def score_name(self, margin: str) -> str:
        """See `RewardSource`."""
        return self.field or margin

    def row_reward(self, margin: str, response: RatedText, tokens: int) -> float:
        """See `RewardSource`."""
        return response.score(self.score_name(margin))

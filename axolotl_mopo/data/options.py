"""What an entry of `datasets:` may say besides where its data is."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from axolotl_mopo.config import Number, Settings


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"a column is compared with one text, number, true or false, not with {value!r:.60}")
    return value


Scalar = Annotated[Any, BeforeValidator(_scalar)]


class EntryOptions(Settings):
    """The keys that every strategy knows."""

    missing_score_hint: ClassVar[str] = ""
    """How to fix a score that is needed and not found."""

    on_bad_row: Literal["raise", "drop"] = Field("raise", description="raise or drop")
    max_pairs_per_prompt: int | None = Field(None, ge=1, strict=True, description="a whole number of at least 1")
    where: dict[str, Scalar] | None = Field(
        None, min_length=1, description="{column: value}; rows whose column has another value are left out"
    )


class ScoredOptions(EntryOptions):
    """The keys of data with scores."""

    score_scale: tuple[Number, Number] | None = Field(None, description="[lowest, highest] score of the data set")

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.score_scale and self.score_scale[0] >= self.score_scale[1]:
            raise ValueError(f"score_scale {list(self.score_scale)} must be [lowest, highest]")
        return self


class PairsOptions(ScoredOptions):
    """The keys of `type: axolotl_mopo.pairs`."""

    missing_score_hint: ClassVar = "; name their columns with field_chosen_scores and field_rejected_scores"

    field_prompt: str | None = Field(None, description="the column of the prompt or its messages")
    field_system: str | None = Field(None, description="the column of the system message")
    field_chosen: str = Field("chosen", description="the column of the preferred response")
    field_rejected: str = Field("rejected", description="the column of the other response")
    field_chosen_scores: str | None = Field(None, description="a column, or a pattern such as chosen_{}")
    field_rejected_scores: str | None = Field(None, description="a column, or a pattern such as rejected_{}")


class ObjectiveOptions(ScoredOptions):
    """The keys of data that several objectives could order."""

    objective: str | list[str] | None = Field(None, description="a name, or a list of names whose mean decides")

    @field_validator("objective")
    @classmethod
    def _not_empty(cls, objective: str | list[str] | None) -> str | list[str] | None:
        if objective == []:
            raise ValueError("the list is empty; name at least one")
        return objective

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names in `objective`; empty if it is not given."""
        if self.objective is None:
            return ()
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)


class ResponsesOptions(ObjectiveOptions):
    """The keys of `type: axolotl_mopo.responses`."""

    keep_unfinished: bool = Field(
        False, strict=True, description="true keeps responses that were cut off at the token limit"
    )


class HelpSteer2Options(ObjectiveOptions):
    """The keys of `type: axolotl_mopo.helpsteer2`."""

    missing_score_hint: ClassVar = "; name the file of the rated responses with ratings"

    ratings: str | None = Field(
        None, min_length=1, description="a file, folder or data set of the hub with HelpSteer2's rated responses"
    )
    ratings_split: str | None = Field(
        None, min_length=1, description="the split of `ratings`, such as train+validation; train where omitted"
    )

    @model_validator(mode="after")
    def _split_of_something(self) -> Self:
        if self.ratings_split and not self.ratings:
            raise ValueError("ratings_split has no effect without ratings; add `ratings` or remove it")
        return self


class SHPOptions(EntryOptions):
    """The keys of `type: axolotl_mopo.shp`."""

    min_score_ratio: Number | None = Field(None, ge=1, description="a number of at least 1")

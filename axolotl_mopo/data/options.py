"""The keys of an entry of `datasets:` besides those that locate the data."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from axolotl_mopo.choices import Completion, Turns
from axolotl_mopo.config import Number, Settings


def _scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"a column's value must be one text, number, true or false, not {value!r:.60}")
    return value


Scalar = Annotated[Any, BeforeValidator(_scalar)]


class EntryOptions(Settings):
    """Keys of every strategy."""

    missing_score_hint: ClassVar[str] = ""
    """How to fix a missing score; appended to the error."""

    on_bad_row: Literal["raise", "drop"] = Field(
        "raise",
        description=(
            "What happens to a bad row: raise or drop. `raise` stops the run before a model is loaded and names the "
            "row; `drop` leaves it out and logs the number of such rows by reason."
        ),
    )
    max_pairs_per_prompt: int | None = Field(
        None,
        ge=1,
        strict=True,
        description=(
            "Maximum number of pairs per prompt, sampled with the `seed` of the YAML; a whole number of at least 1. "
            "Default: all pairs."
        ),
    )
    where: dict[str, Scalar] | None = Field(
        None,
        min_length=1,
        description=(
            "Which rows are read: {column: value}. Rows with another value in the column are left out before they are "
            "parsed; the log gives their number."
        ),
    )
    completion: Completion = Field(
        "all",
        description=(
            "What is trained on of an assistant turn: all or answer. With `answer`, the reasoning before the answer is "
            "read by the model but has no loss, and does not count in lengths and token probabilities."
        ),
    )
    turns: Turns = Field(
        "all",
        description=(
            "Which assistant turns of a response with several are trained on: all or last. User and tool turns between "
            "them never are."
        ),
    )


class ScoredOptions(EntryOptions):
    """Keys of data with scores."""

    score_scale: tuple[Number, Number] | None = Field(
        None,
        description=(
            "AMoPO: scale of the scores of the data, [lowest, highest], mapped linearly to `amopo.score_range` for "
            "the directives. Default: that of the type, else `amopo.score_range`."
        ),
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.score_scale and self.score_scale[0] >= self.score_scale[1]:
            raise ValueError(f"score_scale {list(self.score_scale)} must be [lowest, highest]")
        return self


class PairsOptions(ScoredOptions):
    """Keys of `type: axolotl_mopo.pairs`."""

    missing_score_hint: ClassVar = "; name their columns with field_chosen_scores and field_rejected_scores"

    field_prompt: str | None = Field(
        None,
        description=(
            "Column of the prompt or its messages. Default: prompt, else messages, else question or instruction."
        ),
    )
    field_system: str | None = Field(
        None, description="Column of the system message. Default: system, if it holds a text."
    )
    field_chosen: str = Field("chosen", description="Column of the preferred response.")
    field_rejected: str = Field("rejected", description="Column of the other response.")
    field_chosen_scores: str | None = Field(
        None,
        description=(
            "Scores of the preferred response: a column, or a pattern such as chosen_{}. Default: chosen_scores, else "
            "chosen_{} and score_chosen."
        ),
    )
    field_rejected_scores: str | None = Field(
        None,
        description=(
            "Scores of the other response: a column, or a pattern such as rejected_{}. Default: rejected_scores, else "
            "rejected_{} and score_rejected."
        ),
    )


class ObjectiveOptions(ScoredOptions):
    """Keys of data that several objectives can order."""

    objective: str | list[str] | None = Field(
        None,
        description=(
            "What orders responses without a label: the name of a score, or a list of names to order by the mean of "
            "their scores in comparable units. Default: `modpo.objective`, or the mean of `amopo.dimensions`."
        ),
    )

    @field_validator("objective")
    @classmethod
    def _not_empty(cls, objective: str | list[str] | None) -> str | list[str] | None:
        if objective == []:
            raise ValueError("the list is empty; name at least one score")
        return objective

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names in `objective`; empty if it is not set."""
        if self.objective is None:
            return ()
        return (self.objective,) if isinstance(self.objective, str) else tuple(self.objective)


class ResponsesOptions(ObjectiveOptions):
    """Keys of `type: axolotl_mopo.responses`."""

    keep_unfinished: bool = Field(
        False,
        strict=True,
        description=(
            "Whether responses that were cut off at the token limit (`finished: false`) are kept: true or false. They "
            "would be trained on with an end-of-turn token."
        ),
    )


class HelpSteer2Options(ObjectiveOptions):
    """Keys of `type: axolotl_mopo.helpsteer2`."""

    missing_score_hint: ClassVar = "; name the file of the rated responses with ratings"

    ratings: str | None = Field(
        None,
        min_length=1,
        description=(
            "Rated responses of HelpSteer2, joined with the preferences by prompt and response: a file, a folder or a "
            "data set of the hub. Pairs without both ratings are left out; the log gives their number."
        ),
    )
    ratings_split: str | None = Field(
        None, min_length=1, description="Split of `ratings`, such as train+validation. Default: train."
    )

    @model_validator(mode="after")
    def _split_of_something(self) -> Self:
        if self.ratings_split and not self.ratings:
            raise ValueError("`ratings_split` has no effect without `ratings`; add `ratings` or remove it")
        return self


class SHPOptions(EntryOptions):
    """Keys of `type: axolotl_mopo.shp`."""

    min_score_ratio: Number | None = Field(
        None,
        ge=1,
        description="Minimum `score_ratio` of a pair that is kept; a number of at least 1. Default: all pairs.",
    )

"""The shapes of preference data: each strategy's reader, its keys and the scores that it knows."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from axolotl_mopo.data.formats import general, joined, labelled, rated
from axolotl_mopo.data.options import (
    EntryOptions,
    HelpSteer2Options,
    ObjectiveOptions,
    PairsOptions,
    ResponsesOptions,
    ScoredOptions,
    SHPOptions,
)
from axolotl_mopo.data.rows import Message, PreferencePair, RatedResponse, Row

PairFunction = Callable[[Row, Any], PreferencePair | None]
"""Reads a row that a label orders, by the entry's options; None where the label is a tie."""

ResponsesFunction = Callable[[Row], tuple[list[Message], list[RatedResponse]]]
"""Reads a prompt and its rated responses."""

FilterFunction = Callable[[Row, Any], str | None]
"""Says of a row, by the entry's options, what it is counted as where it is left out; None where it is kept."""


@dataclass(frozen=True)
class Format:
    """How the rows of one data set are laid out: by which of two functions they are read, or by either."""

    options: type[EntryOptions] = EntryOptions
    read_pair: PairFunction | None = None
    read_responses: ResponsesFunction | None = None
    label_column: str | None = None
    """The column that tells labelled rows from rated ones, where there are both."""
    group_column: str | None = None
    """The prompt's column where the rated responses of a prompt stand in several rows."""
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The lowest and the highest value of every score that the data is known to hold; empty where any is possible."""
    left_out: FilterFunction | None = None
    """Leaves rows out before they are read."""
    higher_is_worse: tuple[str, ...] = ()
    """Scores of which less is better."""
    split_column: str | None = None
    """The column of labelled rows that says which split a row belongs to; rows of several splits are not mixed."""
    join: Callable[[Any], joined.Join | None] | None = None
    """Loads, by the entry's options, what labelled rows are joined with; gives None if there is nothing to join."""
    objectives: tuple[str, ...] | None = ()
    """What may order the pairs; empty where the data's own label does, None where any score may."""

    def is_labelled(self, columns: Collection[str]) -> bool:
        """Whether a label orders the rows with these columns."""
        if self.read_pair is None:
            return False
        return self.read_responses is None or self.label_column in columns

    def objective_fault(self, names: Sequence[str]) -> str | None:
        """What is wrong with ordering the pairs by these names, if anything."""
        if self.objectives == ():
            return "the pairs are ordered by the data's own label; drop it" if names else None
        known = "its scores" if self.objectives is None else ", ".join(self.objectives)
        if len(set(names)) < len(names):
            return f"{', '.join(names)} names one twice"
        if unknown := [name for name in names if name not in (self.objectives or names)]:
            return f"{', '.join(unknown)} cannot order the pairs; choose of {known}"
        if self.read_responses is None and len(names) != 1:
            return f"name one of {known}, which orders the pairs"
        if self.read_pair is None and not names:
            return f"name what orders the responses: one of {known}, or several whose mean decides"
        return None


_HELPSTEER = dict.fromkeys((*rated.HELPSTEER_ATTRIBUTES, rated.OVERALL), (0.0, 4.0))
_ULTRAFEEDBACK = dict.fromkeys(rated.ULTRAFEEDBACK_ATTRIBUTES, (1.0, 5.0)) | {rated.OVERALL: (1.0, 10.0)}

FORMATS: dict[str, Format] = {
    "pairs": Format(PairsOptions, general.read_pair),
    "amopo": Format(ScoredOptions, labelled.read_amopo),
    "helpsteer": Format(
        ObjectiveOptions,
        read_responses=rated.read_helpsteer,
        group_column="prompt",
        scales=_HELPSTEER,
        objectives=tuple(_HELPSTEER),
    ),
    "helpsteer2": Format(
        HelpSteer2Options,
        labelled.read_helpsteer2_preference,
        rated.read_helpsteer,
        label_column="preference_strength",
        group_column="prompt",
        split_column="split",
        join=joined.join_ratings,
        scales=_HELPSTEER,
        objectives=tuple(_HELPSTEER),
    ),
    "helpsteer3": Format(EntryOptions, labelled.read_helpsteer3),
    "ultrafeedback": Format(
        ObjectiveOptions,
        read_responses=rated.read_ultrafeedback,
        scales=_ULTRAFEEDBACK,
        objectives=tuple(_ULTRAFEEDBACK),
    ),
    "responses": Format(
        ResponsesOptions,
        read_responses=rated.read_responses,
        group_column="prompt",
        left_out=rated.unfinished,
        objectives=None,
    ),
    "safe_rlhf": Format(
        ObjectiveOptions,
        labelled.read_safe_rlhf,
        scales=labelled.SAFE_RLHF_SCALES,
        higher_is_worse=("severity_level",),
        objectives=("better", "safer"),
    ),
    "hh_rlhf": Format(EntryOptions, labelled.read_hh_rlhf),
    "shp": Format(SHPOptions, labelled.read_shp, left_out=labelled.below_score_ratio),
    "arena": Format(EntryOptions, labelled.read_arena),
    "stack_exchange_paired": Format(EntryOptions, labelled.read_stack_exchange),
    "summarize_from_feedback": Format(EntryOptions, labelled.read_summaries),
}

__all__ = ["FORMATS", "FilterFunction", "Format", "PairFunction", "ResponsesFunction"]

"""The formats of preference data: the reader, the keys and the known scores of each strategy."""

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
"""Reads a labelled row with the entry's options; returns None if the label is a tie."""

ResponsesFunction = Callable[[Row], tuple[list[Message], list[RatedResponse]]]
"""Reads a prompt and its rated responses."""

FilterFunction = Callable[[Row, Any], str | None]
"""Decides with the entry's options whether a row is left out; returns a description for the log, or None to keep it."""


@dataclass(frozen=True)
class Format:
    """The layout of a data set's rows, with a function that reads labelled rows, one that reads rated rows, or both."""

    options: type[EntryOptions] = EntryOptions
    read_pair: PairFunction | None = None
    read_responses: ResponsesFunction | None = None
    label_column: str | None = None
    """The column that distinguishes labelled rows from rated ones, if the format has both."""
    group_column: str | None = None
    """The prompt column, if the rated responses to a prompt are in several rows."""
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The lowest and the highest value of every score in the data; empty if any score is possible."""
    left_out: FilterFunction | None = None
    """Leaves rows out before they are read."""
    higher_is_worse: tuple[str, ...] = ()
    """Scores for which lower is better."""
    split_column: str | None = None
    """The column with the split of a labelled row; rows of several splits are not mixed."""
    join: Callable[[Any], joined.Join | None] | None = None
    """Loads what labelled rows are joined with, given the entry's options; returns None if there is nothing to join."""
    objectives: tuple[str, ...] | None = ()
    """Scores or labels that can order the pairs; empty if the data's own label orders them, None if any score can."""

    def is_labelled(self, columns: Collection[str]) -> bool:
        """Whether a label orders the rows with these columns."""
        if self.read_pair is None:
            return False
        return self.read_responses is None or self.label_column in columns

    def objective_fault(self, names: Sequence[str]) -> str | None:
        """Return what is wrong with ordering the pairs by these names; None if nothing is."""
        if self.objectives == ():
            return "the pairs are ordered by the data's own label; remove it" if names else None
        known = "its scores" if self.objectives is None else ", ".join(self.objectives)
        if len(set(names)) < len(names):
            return f"{', '.join(names)} contains a name twice; remove one"
        if unknown := [name for name in names if name not in (self.objectives or names)]:
            return f"{', '.join(unknown)} cannot order the pairs; choose from {known}"
        if self.read_responses is None and len(names) != 1:
            return f"name one of {known} to order the pairs by"
        if self.read_pair is None and not names:
            return f"name one of {known} to order the responses by, or several to order them by the mean"
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

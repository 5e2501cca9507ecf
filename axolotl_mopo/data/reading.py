"""What a run needs of the rows of one data set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from axolotl_mopo.data.options import EntryOptions, HelpSteer2Options, PairsOptions
from axolotl_mopo.data.rows import PreferencePair, RatedResponse, RowError, rescale


@dataclass(frozen=True)
class Reading:
    """How rows are read, and which scores a pair must have."""

    options: EntryOptions
    objective: tuple[str, ...] = ()
    """Names whose mean orders the pairs, where no label does."""
    chosen_scores: tuple[str, ...] = ()
    rejected_scores: tuple[str, ...] = ()
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Where these scores must lie."""
    seed: int = 42
    """Decides which pairs of a prompt are kept where `max_pairs_per_prompt` caps them."""
    joined: Any = None
    """What the format's `join` has loaded for the rows to be joined with."""

    def missing(self, pair: PreferencePair) -> list[str]:
        """The scores that the pair needs and does not have, each with the side that lacks it."""
        sides = (("chosen", pair.chosen, self.chosen_scores), ("rejected", pair.rejected, self.rejected_scores))
        return [
            f"{name} for the {side} response" + (", where no finite number stands" if name in response.scores else "")
            for side, response, names in sides
            for name in names
            if response.scores.get(name) is None
        ]

    def check_scales(self, response: RatedResponse) -> None:
        """Hold a response's scores against their scales.

        Raises:
            RowError: where one lies outside.
        """
        for name, scale in self.scales.items():
            if (value := response.scores.get(name)) is not None:
                rescale(value, scale, scale, name)

    def check_scores(self, pair: PreferencePair) -> None:
        """Hold a labelled pair's scores against what the run needs.

        Raises:
            RowError: where one is missing or outside its scale.
        """
        if missing := self.missing(pair):
            found = sorted({*pair.chosen.scores, *pair.rejected.scores})
            hints = {
                PairsOptions: "; name their columns with field_chosen_scores and field_rejected_scores",
                HelpSteer2Options: "; name the file of the rated responses with ratings",
            }
            raise RowError(
                f"it has no score of {'; none of '.join(missing)}; found were {', '.join(found) or 'no scores'}"
                + hints.get(type(self.options), ""),
                "missing score",
            )
        self.check_scales(pair.chosen)

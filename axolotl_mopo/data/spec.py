"""The settings that decide how the rows of one data set become training examples."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationInfo, field_validator

from axolotl_mopo.config import MarginColumns, RowSettings
from axolotl_mopo.data.formats import FORMATS, Format
from axolotl_mopo.data.options import EntryOptions
from axolotl_mopo.data.rows import PreferencePair, RatedResponse, rescale
from axolotl_mopo.digests import digest
from axolotl_mopo.errors import RowError
from axolotl_mopo.version import __version__


class DataSpec(BaseModel):
    """One data set: how its rows are read, and which scores a run needs from them."""

    model_config = ConfigDict(frozen=True)

    where: str
    """The entry in the YAML and its path, for messages."""
    strategy: str
    """The part of `type:` after `axolotl_mopo.`; a key of `FORMATS`."""
    objective: tuple[str, ...] = ()
    """Scores whose mean orders responses without a label, or the label that orders them if there are several."""
    options: SerializeAsAny[EntryOptions]
    seed: int = 42
    """Decides which pairs of a prompt are kept if `max_pairs_per_prompt` limits them."""
    chosen_scores: tuple[str, ...] = ()
    rejected_scores: tuple[str, ...] = ()
    scales: dict[str, tuple[float, float]] = {}
    """The data set's own scale of these scores; a score outside it is an error."""
    settings: RowSettings = MarginColumns(margins={}, texts=False)
    """The method's settings that prepared rows depend on."""
    excess_length_strategy: str = "drop"
    """Axolotl's own key, which Axolotl does not include in its digest of prepared rows."""
    content: tuple[str, str] = ("", "")
    """Digests of the local files of the data and of the tokenizer; Axolotl identifies them by path only."""
    reading_version: int = 4
    """Increased whenever the same rows and options yield different examples."""
    version: str = __version__

    @field_validator("options", mode="before")
    @classmethod
    def _of_strategy(cls, options: Any, info: ValidationInfo) -> Any:
        format, objective = FORMATS[info.data["strategy"]], info.data["objective"]
        if not isinstance(options, EntryOptions):
            # Axolotl turns nested mappings into DictDefault, which returns a value for every attribute.
            options = format.options.model_validate(json.loads(json.dumps(options)))
        if objective and not format.read_responses:  # what reads a row finds the label in the options
            options = options.model_copy(update={"objective": list(objective)})
        return options

    @property
    def key(self) -> str:
        """A digest of all settings."""
        return digest(self.model_dump(mode="json"))[:16]

    @property
    def format(self) -> Format:
        """The layout of the rows."""
        return FORMATS[self.strategy]

    def missing(self, pair: PreferencePair) -> list[str]:
        """List the scores that the pair needs and does not have, each with its side."""
        sides = (("chosen", pair.chosen, self.chosen_scores), ("rejected", pair.rejected, self.rejected_scores))
        return [
            f"{name} for the {side} response"
            + (" (its value is not a finite number)" if name in response.scores else "")
            for side, response, names in sides
            for name in names
            if response.scores.get(name) is None
        ]

    def check_scales(self, response: RatedResponse) -> None:
        """Check a response's scores against their scales.

        Raises:
            RowError: if a score is outside its scale.
        """
        for name, scale in self.scales.items():
            if (value := response.scores.get(name)) is not None:
                rescale(value, scale, scale, name)

    def check_scores(self, pair: PreferencePair) -> None:
        """Check a labelled pair's scores against what the run needs.

        Raises:
            RowError: if one is missing or outside its scale.
        """
        if missing := self.missing(pair):
            found = sorted({*pair.chosen.scores, *pair.rejected.scores})
            raise RowError(
                f"it has no score of {' and none of '.join(missing)}; "
                + (f"its scores are {', '.join(found)}" if found else "it has no scores at all")
                + self.options.missing_score_hint,
                "missing score",
            )
        self.check_scales(pair.chosen)

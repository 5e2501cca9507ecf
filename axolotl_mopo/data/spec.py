"""Everything that decides how the rows of one data set become training examples."""

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
    """One data set: how its rows are read, and what a run needs of them."""

    model_config = ConfigDict(frozen=True)

    where: str
    """The entry in the YAML and its path, for messages."""
    strategy: str
    """What `type:` names after `axolotl_mopo.`, a key of `FORMATS`."""
    options: SerializeAsAny[EntryOptions]
    objective: tuple[str, ...] = ()
    """Names whose mean orders responses that no label orders."""
    seed: int = 42
    """Decides which pairs of a prompt are kept where `max_pairs_per_prompt` caps them."""
    chosen_scores: tuple[str, ...] = ()
    rejected_scores: tuple[str, ...] = ()
    scales: dict[str, tuple[float, float]] = {}
    """The data set's own scale of each of these scores, outside of which none may lie."""
    settings: RowSettings = MarginColumns(margins={}, texts=False)
    """The part of the method's settings that prepared rows depend on."""
    excess_length_strategy: str = "drop"
    """Axolotl's own key, which it leaves out of the name of prepared rows."""
    content: tuple[str, str] = ("", "")
    """Digests of the local files that the data and the tokenizer are read from; Axolotl knows them by their paths."""
    reading_version: int = 3
    """Changes where the same rows and options are read as other examples."""
    version: str = __version__

    @field_validator("options", mode="before")
    @classmethod
    def _of_strategy(cls, options: Any, info: ValidationInfo) -> Any:
        if isinstance(options, EntryOptions):
            return options
        # Axolotl turns mappings within mappings into a kind of its own, which has every attribute that is asked for.
        return FORMATS[info.data["strategy"]].options.model_validate(json.loads(json.dumps(options)))

    @property
    def key(self) -> str:
        """A digest of the whole."""
        return digest(self.model_dump(mode="json"))[:16]

    @property
    def format(self) -> Format:
        """How the rows are laid out."""
        return FORMATS[self.strategy]

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
        """Check a response's scores against their scales.

        Raises:
            RowError: if one lies outside.
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
                f"it has no score of {'; none of '.join(missing)}; found were {', '.join(found) or 'no scores'}"
                + self.options.missing_score_hint,
                "missing score",
            )
        self.check_scales(pair.chosen)

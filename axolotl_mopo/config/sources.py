"""Sources of rewards: the common base class and the table of the sources."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator
from pydantic_core import PydanticCustomError

from axolotl_mopo.config.settings import Number, Settings

if TYPE_CHECKING:
    from torch import Tensor


TRAINING_KEYS = frozenset({"clip", "normalize", "scale"})
"""Keys of every source that define how MODPO uses the reward, not the reward itself."""


ModelKind = Literal["adapter", "model", "base", "classifier"]
"""A LoRA adapter of the run's base model, a full causal model, the model that this model was trained from, or a
sequence classifier."""


class RatedText(Protocol):
    """A response of a data set with its scores."""

    @property
    def text(self) -> str:
        """The response."""

    def score(self, name: str) -> float:
        """The score called `name`; raises RowError if there is none."""


class Responses(Protocol):
    """Responses that a source computes rewards for: pairs of a training run, or responses of a policy in a comparison.

    Every method returns one number for each response, in a shape that the caller knows.
    """

    def row_rewards(self, source: "RewardSource") -> "Tensor":
        """The rewards of a source that needs only the row, from its `row_reward`."""

    def text_rewards(self, source: Any) -> "Tensor":
        """The rewards of a `TextSource`, which reads prompts and responses."""

    def logps(self, path: str) -> "Tensor":
        """Log-probs of the responses under the model or the adapter at `path`."""

    def reference_logps(self, path: str, reference: str | None) -> "Tensor":
        """Log-probs under the model `reference`, or under the base model of the adapter at `path` if that is None."""


class RewardSource(Settings):
    """A source of rewards: its settings, their check before a model is loaded, the digest of its content, its rewards.

    MODPO's margins and `axolotl mopo score` use the same class. To add a source, derive from this class or from
    `axolotl_mopo.rewards.TextSource` and add it to `SOURCES`.
    """

    source: str
    clip: tuple[Number, Number] | None = Field(
        None,
        description=(
            "Bounds of the reward: [lowest, highest], two different numbers. A reward outside is set to the nearer one."
        ),
    )
    normalize: Literal["none", "std"] = Field(
        "none",
        description=(
            "Normalization of the reward: none or std, which divides it by the standard deviation of chosen minus "
            "rejected over the training pairs."
        ),
    )
    scale: Number = Field(
        1.0,
        description="Factor of the reward, after `clip` and `normalize`. Any number; 1.0 leaves the reward as it is.",
    )

    argument: ClassVar[str | None] = None
    """The key that ARGUMENT sets in `axolotl mopo score --scorer NAME=SOURCE:ARGUMENT`."""
    in_rows: ClassVar[bool] = False
    """Whether `row_reward` computes the reward, once, when rows are prepared."""
    needs_texts: ClassVar[bool] = False
    """Whether prepared rows must keep the texts of prompt and responses."""
    needs_scores: ClassVar[bool] = False
    """Whether the reward is a score of the data set, which generated responses do not have."""
    negated: ClassVar[str | None] = None
    """Name of the quantity that the reward is the negative of, if less of it can be better; else None."""

    @field_validator("clip")
    @classmethod
    def _ascending(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip and clip[0] >= clip[1]:
            raise ValueError(
                f"the lowest reward {clip[0]:g} is not below the highest {clip[1]:g}; write [lowest, highest]"
            )
        return clip

    def score_name(self, margin: str) -> str | None:
        """Name of the data set's score that the margin `margin` uses as its reward; None if it uses none."""
        return None

    @property
    def code(self) -> str | None:
        """Name of the user's code that computes the rewards, for messages; None if there is none."""
        return None

    @property
    def model_paths(self) -> dict[str, ModelKind]:
        """The keys that name a model, and the kind of each model."""
        return {}

    @property
    def needs_base_model(self) -> bool:
        """Whether the rewards depend on the run's base model, whose weights must not change."""
        return False

    def resolve(self, where: str, run: Mapping[str, Any]) -> Self:
        """Validate the source without loading a model, and fill in settings that its own files define.

        Args:
            where: start of its key in messages, with an opening backtick only.
            run: the raw YAML of the run; empty outside a run.

        Raises:
            ConfigError: if the source does not exist, does not fit the run, or a setting is missing.
        """
        return self

    def content_digest(self) -> str:
        """A digest of everything besides these settings and the responses that the rewards depend on."""
        return ""

    def row_reward(self, margin: str, response: RatedText, tokens: int) -> float:
        """The reward of one response; implemented if `in_rows`.

        Args:
            margin: the name of the margin.
            response: its text and its scores.
            tokens: number of its tokens, including the end-of-turn token.

        Raises:
            RowError: if the response does not have the needed score.
        """
        raise NotImplementedError

    def rewards(self, responses: Responses) -> "Tensor":
        """The reward of every response; by default the one that `row_reward` gives."""
        return responses.row_rewards(self)


SOURCES: dict[str, type[RewardSource]] = {}
"""The classes that `source:` may name. `axolotl_mopo.rewards` adds those of this package; a plugin can add others."""


def _source(value: Any) -> RewardSource:
    if not SOURCES:
        raise RuntimeError("no source is known yet: import axolotl_mopo.rewards before settings with sources are read")
    source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", None)
    if not isinstance(source, str) or source not in SOURCES:
        known = ", ".join(SOURCES)
        raise PydanticCustomError("unknown_source", "its source is unknown; use one of {known}", {"known": known})
    return SOURCES[source].model_validate(value)


Margin = Annotated[SerializeAsAny[RewardSource], BeforeValidator(_source)]
"""A source of the class that `source:` names."""


def nested_margin(keys: list[Any], raw: Mapping[str, Any]) -> tuple[str, type[RewardSource], list[Any]] | None:
    """See `Settings.nested`, for settings that have sources under the key `margins`."""
    if keys[:1] != ["margins"] or len(keys) < 3:
        return None
    _, name, *rest = keys
    return f"margins.{name}", SOURCES[raw["margins"][name]["source"]], rest

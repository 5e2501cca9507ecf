"""Where an objective's reward comes from: what each source has in common, and the table of the sources."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator
from pydantic_core import PydanticCustomError

from axolotl_mopo.config.settings import Number, Settings

if TYPE_CHECKING:
    from torch import Tensor


TRAINING_KEYS = frozenset({"clip", "normalize", "scale"})
"""Keys of every source that say how MODPO uses the reward, not what the reward is."""


ModelKind = Literal["adapter", "model", "base", "classifier"]
"""A LoRA adapter of the run's base model, a causal model of its own, the model that this was trained from, or a
sequence classifier."""


class RatedText(Protocol):
    """A response of a data set with its scores."""

    @property
    def text(self) -> str:
        """The response."""

    def score(self, name: str) -> float:
        """Its score of a name; raises RowError if there is none."""


class Responses(Protocol):
    """Responses that a source gives rewards to: pairs of a training run, or a policy's in a comparison.

    Every method returns one number for each response, in a shape that the caller knows.
    """

    def row_rewards(self, source: "RewardSource") -> "Tensor":
        """The rewards of a source that needs nothing but the row, by its `row_reward`."""

    def text_rewards(self, source: Any) -> "Tensor":
        """The rewards of a `TextSource`, which reads prompts and responses."""

    def logps(self, path: str) -> "Tensor":
        """Log-probs of the responses under the model or the adapter at `path`."""

    def reference_logps(self, path: str, reference: str | None) -> "Tensor":
        """Log-probs under the model `reference`, or under the base model of the adapter at `path` if that is None."""


class RewardSource(Settings):
    """A source of rewards: its settings, its check before anything is loaded, its content's digest, its rewards.

    MODPO's margins and `axolotl mopo score` use the same class. To add a source, derive from this class, or from
    `axolotl_mopo.rewards.TextSource`, and enter it into `SOURCES`.
    """

    source: str
    clip: tuple[Number, Number] | None = Field(
        None,
        description=(
            "Bounds of the reward: [lowest, highest], two different numbers. A value outside is set to the nearer one."
        ),
    )
    normalize: Literal["none", "std"] = Field(
        "none",
        description=(
            "Standardisation of the reward: none or std, which divides it by the standard deviation of chosen minus "
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
    """Whether `row_reward` gives the reward, so that it is computed once, when rows are prepared."""
    needs_texts: ClassVar[bool] = False
    """Whether prepared rows must keep the texts of prompt and responses."""
    needs_scores: ClassVar[bool] = False
    """Whether the reward is a score of the data set, which responses made by a policy do not have."""
    negated: ClassVar[str | None] = None
    """What the reward is the negative of, if it is that of something of which one may want less."""

    @field_validator("clip")
    @classmethod
    def _ascending(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip and clip[0] >= clip[1]:
            raise ValueError(f"the lowest reward {clip[0]:g} is not below the highest {clip[1]:g}")
        return clip

    def score_name(self, margin: str) -> str | None:
        """The score of the data set that the reward of the margin `margin` is; None if it is not a score."""
        return None

    @property
    def code(self) -> str | None:
        """The name of the code of others that computes the rewards, for messages; None if there is none."""
        return None

    @property
    def model_paths(self) -> dict[str, ModelKind]:
        """The keys that name a model, and what kind of model each is."""
        return {}

    @property
    def needs_base_model(self) -> bool:
        """Whether the rewards are measured against the run's base model, whose weights must not be changed."""
        return False

    def resolve(self, where: str, run: Mapping[str, Any]) -> Self:
        """Validate the source without loading a model, and fill in settings that its own files define.

        Args:
            where: the beginning of its key in messages, with a backtick before it and none after it.
            run: the raw YAML of the run; empty where it is not for one.

        Raises:
            ConfigError: if the source does not exist, does not fit the run, or a setting is missing.
        """
        return self

    def content_digest(self) -> str:
        """A digest of all that the rewards depend on besides these settings and the responses."""
        return ""

    def row_reward(self, margin: str, response: RatedText, tokens: int) -> float:
        """The reward of one response, if `in_rows`.

        Args:
            margin: the name of the margin.
            response: its text and scores.
            tokens: the number of its tokens, the end-of-turn token included.

        Raises:
            RowError: if the response does not have the score that is needed.
        """
        raise NotImplementedError

    def rewards(self, responses: Responses) -> "Tensor":
        """The reward of every response."""
        raise NotImplementedError


SOURCES: dict[str, type[RewardSource]] = {}
"""The classes that `source:` may name. `axolotl_mopo.rewards` enters this package's own, a plugin may enter others."""


def _source(value: Any) -> RewardSource:
    source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", None)
    if not isinstance(source, str) or source not in SOURCES:
        known = ", ".join(SOURCES)
        raise PydanticCustomError("unknown_source", "it has no known source, one of {known}", {"known": known})
    return SOURCES[source].model_validate(value)


Margin = Annotated[SerializeAsAny[RewardSource], BeforeValidator(_source)]
"""A source of any class, which `source:` names."""

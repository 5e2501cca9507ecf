"""The YAML blocks of the methods: `modpo:` and `amopo:`."""

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, Field, field_validator, model_validator

from axolotl_mopo.choices import AMoPOLossType, MODPOLossType, WeightingScheme
from axolotl_mopo.config.directives import Directive, PromptSettings
from axolotl_mopo.config.settings import Number, Settings, did_you_mean
from axolotl_mopo.config.sources import TRAINING_KEYS, Margin, RewardSource, nested_margin


class MethodConfig(Settings):
    """Settings of every method: how a step is computed."""

    rl: ClassVar[str]
    """Name of the method in `rl:`, and of its block."""
    trainer: ClassVar[str]
    """Dotted name of the trainer, which Axolotl imports when it needs it."""

    renamed: ClassVar = {"max_tokens_per_step": "max_tokens_per_pass"}

    layout: Literal["packed", "padded"] | None = Field(
        None,
        description=(
            "Layout of token sequences: packed or padded. `packed` uses prefix trees without padding, `padded` one row "
            "for every prompt and completion. Default: the fastest layout that passes the start-up check."
        ),
    )
    max_tokens_per_pass: int | None = Field(
        None,
        ge=1,
        strict=True,
        description=(
            "Largest number of tokens of one forward pass, at least 1; a micro-batch with more is split into passes, "
            "with the same gradients. Default: no limit."
        ),
    )
    logits_budget: Number = Field(
        1.5,
        gt=0,
        description=(
            "Largest memory in GiB for logits and their gradient; a positive number. Above it, the head runs in chunks."
        ),
    )
    router_aux_loss_coef: Number | None = Field(
        None,
        ge=0,
        description=(
            "Coefficient of the load-balancing loss of a mixture of experts; a number of at least 0, and 0 disables "
            "it. Default: 0.001 for a mixture of experts."
        ),
    )
    on_bad_loss: Literal["raise", "skip"] = Field(
        "raise",
        description=(
            "What happens if a loss is not finite: raise or skip. `raise` stops the run; `skip` skips the optimizer "
            "step and counts it in the log."
        ),
    )

    @property
    def row_settings(self) -> "RowSettings":
        """The part of the settings that prepared rows depend on."""
        raise NotImplementedError

    @property
    def ordering(self) -> tuple[str, list[str]]:
        """The key that orders rated responses and the names in it; a data-set entry may name others."""
        raise NotImplementedError


class MarginColumns(Settings):
    """MODPO's settings that prepared rows depend on, without the weights, so that a sweep shares its rows."""

    margins: dict[str, Margin]
    """The sources whose rewards are computed from a row alone, without clip, normalize and scale."""
    texts: bool
    """Whether a margin reads the texts."""

    scores_key: ClassVar[str] = "margins"
    """Key of the YAML that names the scores."""
    score_range: ClassVar[None] = None
    """No directives, so scores are not mapped to a range."""

    @property
    def score_names(self) -> list[str]:
        """Scores that both responses of a pair must have."""
        names = (source.score_name(margin) for margin, source in self.margins.items())
        return [name for name in names if name is not None]

    @property
    def rejected_score_names(self) -> list[str]:
        """Same as `score_names`."""
        return self.score_names

    def training_directives(self, scores: Mapping[str, float]) -> list[Directive]:
        """The one prompt of a pair has no directive."""
        return [Directive("", "")]


RowSettings = PromptSettings | MarginColumns


class MODPOConfig(MethodConfig):
    """The `modpo:` block."""

    rl: ClassVar = "modpo"
    trainer: ClassVar = "axolotl_mopo.training.modpo.MODPOTrainer"

    objective: str = Field(description="Name of the objective that orders the pairs into `chosen` and `rejected`.")
    weights: dict[str, Number] = Field(
        description=(
            "Weights of the objectives: a mapping from the objective and every margin to its weight. The weight of the "
            "objective is positive; others are any number, and a negative one reverses a score. They need not sum to 1."
        ),
    )
    beta: Number = Field(
        0.1,
        gt=0,
        description=(
            "Strength of the KL penalty towards the reference; a positive number. The authors use 0.1. The loss "
            "divides beta by the weight of the objective."
        ),
    )
    loss_type: MODPOLossType = Field(
        "sigmoid",
        description=(
            "Loss of a pair with the implicit reward s: sigmoid or hinge, which are -log sigmoid(s(chosen) - "
            "s(rejected)) and relu(1 - (s(chosen) - s(rejected)))."
        ),
    )
    margins: dict[str, Margin] = Field(
        {},
        description=(
            "Sources of the rewards of the other objectives: a mapping from a name to {source: ...}, one for every "
            "weight except that of the objective."
        ),
    )
    reference: Literal["initial", "base"] = Field(
        "initial",
        description=(
            "Reference model of the KL penalty: initial or base. `initial` is the policy before its first step, "
            "including a loaded adapter; `base` is the base model without adapters."
        ),
    )
    cache_dir: str | None = Field(
        None,
        description=(
            "Folder of the cache of reference log-probs and margin rewards. Default: modpo-cache in "
            "`dataset_prepared_path`."
        ),
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.objective not in self.weights:
            raise ValueError(
                f"weights has no entry for the objective {self.objective!r}; add `{self.objective}: 0.5`"
                f"{did_you_mean(self.objective, self.weights)}"
            )
        for name in self.margins:
            for side in ("chosen", "rejected"):
                if f"{name}/{side}" in self.margins:
                    raise ValueError(
                        f"the margin {name!r} logs the rewards of {side} responses as {name}/{side}, which is the name "
                        "of another margin; rename one of the two"
                    )
        if self.objective in self.margins:
            raise ValueError(
                f"margins names the objective {self.objective!r} itself, but a margin is the reward of another "
                "objective; remove the margin"
            )
        weighted, given = set(self.weights) - {self.objective}, set(self.margins)
        if missing := sorted(weighted - given):
            raise ValueError(
                f"weights names {', '.join(missing)}, for which margins has no entry; add "
                f"`{missing[0]}: {{source: column}}` under margins, or remove the weight"
            )
        if unweighted := sorted(given - weighted):
            raise ValueError(
                f"margins names {', '.join(unweighted)}, for which weights has no entry; add "
                f"`{unweighted[0]}: 0.5` under weights, or remove the margin"
            )
        if self.objective_weight <= 0:
            raise ValueError(
                f"the weight of the objective {self.objective!r} is {self.objective_weight:g} but must be positive: "
                "the loss divides by it; with weight 0 the optimal policy depends on the margins alone, so train "
                "directly on their own preferences instead"
            )
        return self

    @property
    def objective_weight(self) -> float:
        """w_k, the weight of the objective."""
        return self.weights[self.objective]

    @property
    def margin_weights(self) -> list[float]:
        """w_j, the weights of the margins, in the order of `margins`."""
        return [self.weights[name] for name in self.margins]

    @property
    def row_settings(self) -> MarginColumns:
        """The margins that are computed from a row alone, and whether rows must keep their texts."""
        # In one order, since runs whose YAML has another order find the same prepared rows.
        sources = sorted(self.margins.items())
        unused = {key: RewardSource.model_fields[key].default for key in TRAINING_KEYS}
        return MarginColumns(
            margins={name: source.model_copy(update=unused) for name, source in sources if source.in_rows},
            texts=any(source.needs_texts for _, source in sources),
        )

    @property
    def ordering(self) -> tuple[str, list[str]]:
        """The objective."""
        return "objective", [self.objective]

    @classmethod
    def nested(cls, keys: list[Any], raw: Mapping[str, Any]) -> tuple[str, type[BaseModel], list[Any]] | None:
        """See `Settings.nested`."""
        return nested_margin(keys, raw)


class DimensionsConfig(MethodConfig, PromptSettings):
    """The settings of a method with one prompt for each dimension."""

    @property
    def row_settings(self) -> PromptSettings:
        """The settings of the prompts."""
        return PromptSettings(**{name: getattr(self, name) for name in PromptSettings.model_fields})

    @property
    def ordering(self) -> tuple[str, list[str]]:
        """The dimensions."""
        return "dimensions", self.dimensions


class AMoPOConfig(DimensionsConfig):
    """The `amopo:` block."""

    rl: ClassVar = "amopo"
    trainer: ClassVar = "axolotl_mopo.training.amopo.AMoPOTrainer"

    beta: Number = Field(
        0.8,
        gt=0,
        description=(
            "Scale of the reward, which is beta times the mean log-prob of a token; a positive number. The authors "
            "use 0.8."
        ),
    )
    gamma: Number = Field(
        2.0,
        ge=0,
        description=(
            "Target difference between the rewards of chosen and rejected (`simpo` only); a number of at least 0. The "
            "authors use 2.0."
        ),
    )
    loss_type: AMoPOLossType = Field("simpo", description="Loss of one dimension: simpo or orpo.")
    weighting: WeightingScheme | dict[str, float] = Field(
        "gaussian",
        description=(
            "Weights of the dimensions: gaussian (drawn from the mean and standard deviation of token probabilities), "
            "mean (the mean, without drawing), uniform (1/D), or {name: weight, ...} for every prompt, which sum to 1. "
            "Evaluation never draws."
        ),
    )
    temperature: Number = Field(
        1.0,
        gt=0,
        description=(
            "Temperature of the softmax over dimensions (`gaussian` and `mean` only); a positive number. The paper "
            "uses 1.0, where weights are nearly uniform; below it they differ more."
        ),
    )
    sft_coef: Number = Field(
        0.0,
        ge=0,
        description=(
            "Coefficient of an SFT loss, the mean negative log-likelihood of a chosen token; a number of at least 0, "
            "and 0.0 disables it."
        ),
    )

    @field_validator("weighting", mode="before")
    @classmethod
    def _known_weighting(cls, weighting: Any) -> Any:
        schemes = get_args(WeightingScheme)
        if isinstance(weighting, Mapping):
            for name, weight in weighting.items():
                finite = isinstance(weight, int | float) and 0 <= weight <= sys.float_info.max
                if isinstance(weight, bool) or not finite:
                    raise ValueError(f"the weight of {name} is {weight!r}; it must be a finite number of at least 0")
            total = sum(map(float, weighting.values()))
            if abs(total - 1) > 1e-6:
                raise ValueError(f"the weights sum to {total:g}; they must sum to 1")
        elif weighting not in schemes:
            raise ValueError(
                f"unknown weighting {weighting!r}; use one of {', '.join(schemes)}, or {{dimension: weight, ...}}"
                f"{did_you_mean(str(weighting), schemes)}"
            )
        return weighting

    @model_validator(mode="after")
    def _every_prompt_has_a_weight(self) -> Self:
        if isinstance(self.weighting, dict) and set(self.weighting) != set(self.prompt_names):
            raise ValueError(
                f"weighting names {', '.join(self.weighting)}, but the prompts are {', '.join(self.prompt_names)}; "
                "give each of them a weight"
            )
        return self


METHODS: dict[str, type[MethodConfig]] = {method.rl: method for method in (MODPOConfig, AMoPOConfig)}
"""The methods that `rl:` may name. A plugin of another package can add its own."""


class MOPOArgs(BaseModel):
    """Fields that the plugin adds to Axolotl's configuration."""

    modpo: MODPOConfig | None = None
    amopo: AMoPOConfig | None = None
    mopo_data: dict[str, Any] | None = None
    """Settings of each data set from `axolotl_mopo.data.entries`; set by the plugin, not by the user."""
    mopo_debug: int | None = None
    """Number of rows that `axolotl preprocess --debug` shows; set by the plugin, not by the user."""

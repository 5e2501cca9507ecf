"""The two YAML blocks, every check of them, every error text. Nothing heavy is imported here."""

import difflib
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from axolotl_mopo.data import templates
from axolotl_mopo.data.sandbox import LONGEST_TEMPLATE, check_unicode
from axolotl_mopo.engine import TREE_BACKENDS, carries_trees
from axolotl_mopo.files import read_file

INTEGRATED = "integrated"
"""Name of AMoPO's prompt that asks for all dimensions together."""

_LARGEST_SCORE = 1e6
_NARROWEST_RANGE = 0.01
"""Directives write scores with two decimals."""
_LONGEST_NAME = 200
_SHOWN = 200

WeightingScheme = Literal["gaussian", "mean", "uniform"]


class ConfigError(ValueError):
    """A setting in the YAML that cannot work; the text names the key and says the mend."""


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("input should be a number, not true or false")
    if isinstance(value, bytes):  # of YAML's !!binary
        raise ValueError("input should be a number, not binary data")
    return value


Number = Annotated[float, BeforeValidator(_number)]


class Block(BaseModel):
    """A YAML block of ours: unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


B = TypeVar("B", bound=Block)


class MarginBlock(Block):
    """What every margin may say besides where its reward comes from: clip, then normalize, then scale."""

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

    @field_validator("clip")
    @classmethod
    def _ascending(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip and clip[0] >= clip[1]:
            raise ValueError(f"the lowest reward {clip[0]:g} is not below the highest {clip[1]:g}")
        return clip


class ColumnMargin(MarginBlock):
    """A margin reward that the data set already holds."""

    source: Literal["column"]
    field: str | None = Field(None, description="Name of the score in the data set. Default: the name of the margin.")


class LengthMargin(MarginBlock):
    """Minus the length of the response, for shorter answers."""

    source: Literal["length"]
    unit: Literal["tokens", "words", "characters"] = Field(
        "tokens",
        description="What the length is counted in: one of tokens, words, characters. The reward is minus the count.",
    )


class AdapterMargin(MarginBlock):
    """The implicit reward of a model that was trained on another objective's preferences, such as a DPO adapter."""

    source: Literal["adapter"]
    path: str = Field(
        description=(
            "Where the model of the other objective is: the folder of a LoRA adapter of the same base model, or of a "
            "whole model."
        ),
    )
    beta: Number | None = Field(
        None,
        gt=0,
        description=(
            "Beta of the training of that model (`rl_beta` of its DPO run); a positive number. Default: read from its "
            "mopo.json."
        ),
    )
    reference: str | None = Field(
        None, description="Reference model of a whole model. An adapter's is always the base model."
    )


class RewardModelMargin(MarginBlock):
    """The score of a sequence-classification model."""

    source: Literal["reward_model"]
    path: str = Field(description="Reward model: a folder or a model of the hub.")
    head: int | str | None = Field(
        None,
        description=(
            "Which score of the model is the reward: an index, or a label of its configuration. Required where it has "
            "several."
        ),
    )
    batch_size: int = Field(
        16, ge=1, strict=True, description="Number of responses that are scored at a time, at least 1."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Precision of the reward model: float32, bfloat16 or float16."
    )

    @field_validator("head", mode="before")
    @classmethod
    def _no_boolean(cls, head: Any) -> Any:
        return _number(head)


class TextMargin(MarginBlock):
    """A margin whose reward is computed of texts. A source of another package derives from this and says how."""

    batch_size: int = Field(
        64, ge=1, strict=True, description="Number of responses that are scored at a time, at least 1."
    )

    def rewards(self, prompts: list[list[dict[str, Any]]], responses: list[str]) -> Sequence[float]:
        """The rewards of responses: prompts (messages) and one response to each -> one finite number each."""
        raise NotImplementedError


class CallableMargin(TextMargin):
    """What a user's function says of prompts and responses."""

    source: Literal["callable"]
    function: str = Field(
        pattern=r"^[\w.]+:\w+$",
        description=(
            "Function that returns one reward for each response: package.module:function. It is given prompts "
            "(messages) and responses (texts)."
        ),
    )


RowMargin = ColumnMargin | LengthMargin
"""Margins that a row decides by itself."""
MARGINS: dict[str, type[MarginBlock]] = {
    "column": ColumnMargin,
    "length": LengthMargin,
    "adapter": AdapterMargin,
    "reward_model": RewardModelMargin,
    "callable": CallableMargin,
}
"""What a margin's `source:` may name. Another package's plugin adds its own."""


def _margin(value: Any) -> MarginBlock:
    source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", None)
    if not isinstance(source, str) or source not in MARGINS:
        raise PydanticCustomError("unknown_source", "it has no known source")
    return MARGINS[source].model_validate(value)


Margin = Annotated[SerializeAsAny[MarginBlock], BeforeValidator(_margin)]


class MethodBlock(Block):
    """What the block of every method may say of how a step is computed."""

    rl: ClassVar[str]
    """What `rl:` calls the method; its block has the same name."""
    trainer: ClassVar[str]
    """The dotted name of its trainer, which the host imports when it is needed."""

    layout: Literal["packed", "padded"] | None = Field(
        None,
        description=(
            "How token sequences are laid out: packed or padded. `packed` is prefix trees without padding, `padded` "
            "one row for every prompt and completion. Default: the fastest that passes the start-up check."
        ),
    )
    max_tokens_per_step: int | None = Field(
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
            "Memory in GiB that logits and their gradient may take, a positive number. Above it the head runs in "
            "chunks."
        ),
    )
    router_aux_loss_coef: Number | None = Field(
        None,
        ge=0,
        description=(
            "Coefficient of the load-balancing loss of a mixture of experts; a number of at least 0, and 0 leaves the "
            "term out. Default: 0.001 for a mixture of experts."
        ),
    )
    on_bad_loss: Literal["raise", "skip"] = Field(
        "raise",
        description=(
            "What happens at a loss that is not finite: raise or skip. `raise` stops the run; `skip` makes no "
            "optimizer step and counts it in the log."
        ),
    )


class MODPOConfig(MethodBlock):
    """The `modpo:` block."""

    rl: ClassVar = "modpo"
    trainer: ClassVar = "axolotl_mopo.trainers.MODPOTrainer"

    objective: str = Field(
        description="Name of the objective that orders the pairs: what `chosen` over `rejected` means in the data."
    )
    weights: dict[str, Number] = Field(
        description=(
            "How much each objective counts: a mapping from the objective and every margin to its weight. The weight "
            "of the objective is positive; others are any number, and a negative one turns a score around. They need "
            "not sum to 1."
        ),
    )
    beta: Number = Field(
        0.1,
        gt=0,
        description=(
            "Strength of the KL penalty towards the reference; a positive number. The authors use 0.1. The loss sees "
            "beta divided by the weight of the objective."
        ),
    )
    loss_type: Literal["sigmoid", "hinge"] = Field(
        "sigmoid",
        description=(
            "Loss of a pair with the implicit reward s: sigmoid or hinge, -log sigmoid(s(chosen) - s(rejected)) or "
            "relu(1 - (s(chosen) - s(rejected)))."
        ),
    )
    margins: dict[str, Margin] = Field(
        {},
        description=(
            "Where the reward of each other objective comes from: a mapping from a name to {source: ...}, one for "
            "every weight except that of the objective."
        ),
    )
    reference: Literal["initial", "base"] = Field(
        "initial",
        description=(
            "Model that the policy is pulled towards: initial or base. `initial` is the policy before its first step, "
            "a loaded adapter included; `base` is the base model without adapters."
        ),
    )
    cache_dir: str | None = Field(
        None,
        description=(
            "Where reference log-probs and margin rewards are kept: a folder. Default: modpo-cache in "
            "`dataset_prepared_path`."
        ),
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.objective not in self.weights:
            raise ValueError(
                f"weights has no entry for the objective {self.objective!r}; add `{self.objective}: 0.5`"
                f"{_did_you_mean(self.objective, self.weights)}"
            )
        for name in self.margins:
            for side in ("chosen", "rejected"):
                if f"{name}/{side}" in self.margins:
                    raise ValueError(
                        f"the log calls the {side} responses' rewards of the margin {name!r} {name}/{side}, which is "
                        f"the name of another margin; rename one of the two"
                    )
        if self.objective in self.margins:
            raise ValueError(
                f"margins names the objective {self.objective!r} itself; a margin is the reward of another objective"
            )
        weighted, given = set(self.weights) - {self.objective}, set(self.margins)
        if missing := sorted(weighted - given):
            raise ValueError(
                f"weights names {', '.join(missing)}, for which margins has no entry; add "
                f"`{missing[0]}: {{source: column}}` under margins, or drop the weight"
            )
        if unweighted := sorted(given - weighted):
            raise ValueError(
                f"margins names {', '.join(unweighted)}, for which weights has no entry; add "
                f"`{unweighted[0]}: 0.5` under weights, or drop the margin"
            )
        if self.objective_weight <= 0:
            raise ValueError(
                f"the weight of the objective {self.objective!r} is {self.objective_weight:g} but must be positive: "
                "the loss divides by it; at weight 0 the optimal policy is that of the margins alone, so train that "
                "one directly on their own preferences"
            )
        return self

    @property
    def objective_weight(self) -> float:
        """w_k."""
        return self.weights[self.objective]

    @property
    def margin_weights(self) -> list[float]:
        """w_j, in the order of `margins`."""
        return [self.weights[name] for name in self.margins]


def _template(value: Any, info: ValidationInfo) -> Any:
    """The template's text, from the file where the YAML names one."""
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"file"} or not isinstance(value["file"], str):
        raise ValueError(f"it is {_shortened(dict(value))}; write the template itself, or {{file: PATH}}")
    if not info.context:
        raise ValueError("it names a file, which only the YAML of a run may do; write the template itself")
    try:
        return _read_template(value["file"], info.context["folder"])
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file {value['file']} cannot be read: {error}") from None


def _read_template(name: str, folder: Path) -> str:
    """The text of a template's file.

    A shared YAML must not be able to put any file of the machine into prompts and saved models.

    Args:
        name: relative to the working directory.
        folder: where the file must be, or in a folder of it, once links are followed.

    Raises:
        ValueError: where it is elsewhere, or is no template by its name.
        OSError: where it cannot be read.
    """
    path = Path(name).resolve()
    if not (name.endswith(".jinja") and path.name.endswith(".jinja")):
        to = "" if path.name == Path(name).name else f", a link to {path.name},"
        raise ValueError(f"the file {name}{to} is not a template; its name must end with .jinja")
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(
            f"the file {name} is outside {folder.resolve()}, the folder of the YAML; put it there or in a folder of it"
        )
    return read_file(path, 4 * LONGEST_TEMPLATE, follow_links=False).decode("utf-8").strip()


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


Template = Annotated[str, BeforeValidator(_template)]


class Directives(Block):
    """What AMoPO's prompts say beside the question: Jinja templates, rendered in a sandbox."""

    dimension: Template = Field(
        default=templates.DIMENSION,
        description=(
            "Text of the prompt of one dimension: a Jinja template of dimension, score, low, high and dimensions, or "
            "{file: PATH}."
        ),
    )
    integrated: Template = Field(
        default=templates.INTEGRATED,
        description=(
            "Text of the prompt for all dimensions together: a Jinja template of low, high and dimensions, or {file: "
            "PATH}."
        ),
    )

    @field_validator("dimension")
    @classmethod
    def _dimension_renders(cls, template: str) -> str:
        templates.check(template, templates.DIMENSION_VARIABLES)
        return template

    @field_validator("integrated")
    @classmethod
    def _integrated_renders(cls, template: str) -> str:
        templates.check(template, templates.INTEGRATED_VARIABLES)
        return template


class DimensionsBlock(MethodBlock):
    """What a method says of its prompts, one for every dimension."""

    dimensions: list[str] = Field(
        min_length=1,
        description=(
            "Qualities that prompts ask for, each the name of a score in the data: a list of at least one score name, "
            "[helpfulness, ...]."
        ),
    )
    integrated: bool = Field(
        True,
        description=(
            "Whether there is a prompt for all dimensions together as well, called `integrated` in the log: true or "
            "false."
        ),
    )
    score_range: tuple[Number, Number] = Field(
        (1, 5),
        description=(
            "Scale that directives speak of: [lowest, highest], two different numbers. Scores of the data are mapped "
            "to it."
        ),
    )
    directives: Directives = Field(
        Directives(),
        description=(
            "What the prompts say beside the question: {dimension: TEMPLATE, integrated: TEMPLATE}. Default: the "
            "texts in the guide."
        ),
    )
    directive_position: Literal["before", "after"] = Field(
        "before",
        description=(
            "Where the directive stands: before or after the question. `after` lets all prompts share the question, "
            "so fewer tokens are computed."
        ),
    )

    @field_validator("dimensions")
    @classmethod
    def _distinct(cls, dimensions: list[str]) -> list[str]:
        if repeated := sorted({name for name in dimensions if dimensions.count(name) > 1}):
            raise ValueError(f"{', '.join(repeated)} stands there more than once; name every dimension once")
        if any(not name.strip() for name in dimensions):
            raise ValueError("a dimension has an empty name; a dimension is the name of a score in the data set")
        for name in dimensions:
            if len(name) > _LONGEST_NAME:
                raise ValueError(f"the name {name[:20]!r}... has {len(name):,} characters; give it {_LONGEST_NAME}")
            check_unicode(name)
        return dimensions

    @field_validator("score_range")
    @classmethod
    def _ascending(cls, score_range: tuple[float, float]) -> tuple[float, float]:
        if score_range[0] >= score_range[1]:
            raise ValueError(f"the lowest score {score_range[0]:g} is not below the highest {score_range[1]:g}")
        if max(map(abs, score_range)) > _LARGEST_SCORE:
            raise ValueError(
                f"{score_range[0]:g} to {score_range[1]:g} goes beyond {_LARGEST_SCORE:g}; choose a range that a "
                "prompt can name, such as [1, 5]"
            )
        low, high = map(templates.readable_number, score_range)
        if high - low < _NARROWEST_RANGE / 2:
            raise ValueError(
                f"{score_range[0]:g} and {score_range[1]:g} are the same number once they are written with two "
                "decimals, as directives do; choose a wider range, such as [1, 5]"
            )
        return score_range

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if self.integrated and INTEGRATED in self.dimensions:
            raise ValueError(
                f"a dimension is named {INTEGRATED!r}, as the prompt that asks for all of them is; rename the "
                "dimension or set `integrated: false`"
            )
        return self

    @model_validator(mode="after")
    def _directives_render(self) -> Self:
        for key in ("dimension", "integrated"):
            known = templates.DIMENSION_VARIABLES if key == "dimension" else templates.INTEGRATED_VARIABLES
            trials = templates.tried_values(known, self.dimensions, self.score_range)
            try:
                templates.check(getattr(self.directives, key), known, trials)
            except ValueError as error:
                raise ValueError(
                    f"`directives.{key}` does not go with these dimensions and this range: {error}"
                ) from None
        return self

    @property
    def prompt_names(self) -> list[str]:
        """The D prompts of every pair, in order."""
        return [INTEGRATED, *self.dimensions] if self.integrated else list(self.dimensions)


class AMoPOConfig(DimensionsBlock):
    """The `amopo:` block."""

    rl: ClassVar = "amopo"
    trainer: ClassVar = "axolotl_mopo.trainers.AMoPOTrainer"

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
            "Margin by which the reward of chosen should exceed that of rejected (`simpo` only); a number of at least "
            "0. The authors use 2.0."
        ),
    )
    loss_type: Literal["simpo", "orpo"] = Field("simpo", description="Loss of one dimension: simpo or orpo.")
    weighting: WeightingScheme | dict[str, float] = Field(
        "gaussian",
        description=(
            "Where the weights of the dimensions come from: gaussian (drawn from the mean and standard deviation of "
            "token probabilities), mean (without drawing), uniform (1/D), or {name: weight, ...} for every prompt, "
            "which sum to 1. Evaluation never draws."
        ),
    )
    temperature: Number = Field(
        1.0,
        gt=0,
        description=(
            "Divides the draws before the softmax over dimensions (`gaussian` and `mean` only); a positive number; "
            "1.0 is the paper's. At 1.0 weights are nearly uniform; below it they differ more."
        ),
    )
    sft_coef: Number = Field(
        0.0,
        ge=0,
        description=(
            "Coefficient of an SFT term, the mean negative log-likelihood of a chosen token; a number of at least 0, "
            "and 0.0 leaves the term out."
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
                f"{_did_you_mean(str(weighting), schemes)}"
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


MethodConfig = MODPOConfig | DimensionsBlock
"""What is known of a method's rows: one prompt and margins, or a prompt for every dimension."""
BLOCKS: dict[str, type[MODPOConfig] | type[DimensionsBlock]] = {block.rl: block for block in (MODPOConfig, AMoPOConfig)}
"""What `rl:` may name. Another package's plugin adds its own."""

_OLD_ATTENTION_KEYS = ("flex_attention", "xformers_attention", "sage_attention")
"""Keys of the host for what `attn_implementation` says today, and trees cannot go by."""
_OTHER_METHODS_KEYS = {
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "simpo_gamma": "gamma",
    "cpo_alpha": "sft_coef",
    "orpo_alpha": "beta",
    "trl": "beta",
}
"""Keys of Axolotl for what another key of the block says."""
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    ": it belongs to another method of Axolotl": (
        "center_rewards_coefficient",
        "dpo_label_smoothing",
        "dpo_loss_type",
        "dpo_loss_weights",
        "dpo_padding_free",
        "dpo_use_liger_kernel",
        "dpo_use_weighting",
        "ebft",
        "kto_desirable_weight",
        "kto_undesirable_weight",
        "precompute_ref_log_probs",
        "process_reward_model",
        "reward_model",
        "rl_adapter_ref_model",
    ),
    ": Axolotl reads it for supervised training alone": (
        "auto_find_batch_size",
        "batch_flattening",
        "bench_dataset",
        "bench_split",
        "chat_template_kwargs",
        "curriculum_sampling",
        "dataset_keep_in_memory",
        "dataset_shard_idx",
        "dataset_shard_num",
        "do_bench_eval",
        "do_causal_lm_eval",
        "eot_tokens",
        "eval_causal_lm_metrics",
        "eval_max_new_tokens",
        "eval_sample_packing",
        "eval_sequence_len",
        "eval_table_size",
        "generate_samples",
        "generation_top_k",
        "generation_top_p",
        "image_resize_algorithm",
        "jagged_restart_anneal_steps",
        "jagged_restart_steps",
        "jagged_restart_warmup_steps",
        "lisa_n_layers",
        "lisa_step_interval",
        "loss_watchdog_patience",
        "loss_watchdog_threshold",
        "lr_quadratic_warmup",
        "min_sample_len",
        "multipack_real_batches",
        "neftune_noise_alpha",
        "noisy_embedding_alpha",
        "pad_to_sequence_len",
        "pose_max_context_len",
        "pose_num_chunks",
        "pose_split_on_token_ids",
        "pretrain_multipack_buffer_size",
        "pretraining_dataset",
        "pretraining_sample_concatenation",
        "relora",
        "relora_cpu_offload",
        "relora_prune_ratio",
        "role_boundaries",
        "sample_packing_eff_est",
        "sample_packing_mp_start_method",
        "sample_packing_sequentially",
        "streaming",
        "total_supervised_tokens",
        "train_on_inputs",
        "use_pose",
    ),
    ", whose loss is no cross-entropy": (
        "chunked_cross_entropy",
        "chunked_cross_entropy_num_chunks",
        "cut_cross_entropy",
        "flash_attn_cross_entropy",
        "liger_cross_entropy",
        "liger_fused_linear_cross_entropy",
        "liger_use_token_scaling",
        "use_eaft",
    ),
    ": Axolotl reads it nowhere": (
        "evaluation_strategy",
        "fsdp_final_state_dict_type",
        "lr_div_factor",
        "max_prompt_len",
        "preprocess_iterable",
    ),
}
"""Keys of Axolotl that would change nothing, by the reason that the error gives."""


class MOPOArgs(BaseModel):
    """The fields that the plugin adds to Axolotl's configuration."""

    modpo: MODPOConfig | None = None
    amopo: AMoPOConfig | None = None
    mopo_data: dict[str, Any] | None = None
    """What `axolotl_mopo.data.entries` learned of each data set; filled in by the plugin, not by the user."""


def fold_dotted_keys(cfg: MutableMapping[str, Any]) -> None:
    """Move top-level keys such as `modpo.weights` into their block, in place; a sweep replaces top-level keys only."""
    for dotted in [key for key in cfg if isinstance(key, str) and key.partition(".")[0] in BLOCKS and "." in key]:
        *parents, key = dotted.split(".")
        block = cfg
        for parent in parents:
            if block.get(parent) is None:
                block[parent] = {}
            block = block[parent]
            if not isinstance(block, MutableMapping):
                raise ConfigError(f"`{dotted}`: `{parent}` is not a mapping, so nothing can be set in it")
        block[key] = cfg.pop(dotted)


def read_method(cfg: Mapping[str, Any], method: str, folder: Path | None = None) -> MethodConfig:
    """Check the raw YAML of a run of `rl: <method>` and return the method's block.

    Args:
        cfg: the YAML.
        method: one of ours.
        folder: below which the YAML may name files of templates; None where it may name none.

    Raises:
        ConfigError: naming every wrong key of the block, or the keys outside it that contradict it.
    """
    for other in BLOCKS:
        if other != method and cfg.get(other) is not None:
            raise ConfigError(f"`{other}:` stands beside `rl: {method}`; drop the block, or set `rl: {other}`")
    if cfg.get(method) is None:
        required = " and ".join(name for name, field in BLOCKS[method].model_fields.items() if field.is_required())
        raise ConfigError(f"`rl: {method}` needs a block `{method}:` with at least {required}")
    for key, ours in _OTHER_METHODS_KEYS.items():
        if cfg.get(key) is not None:
            raise ConfigError(f"`{key}` has no effect with `rl: {method}`; remove it (see `{method}.{ours}`)")
    if cfg.get("pad_to_multiple_of"):
        raise ConfigError(f"`pad_to_multiple_of` has no effect with `rl: {method}`, which packs; remove it")
    for reason, keys in WITHOUT_EFFECT.items():
        for key in keys:
            if cfg.get(key):
                raise ConfigError(f"`{key}` has no effect with `rl: {method}`{reason}; remove it")
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        if cfg.get(key) not in (None, 1):
            raise ConfigError(f"`{key}` other than 1 does not work with `rl: {method}`; remove it")
    if cfg.get("remove_unused_columns"):
        raise ConfigError(f"`remove_unused_columns: true` would drop the columns of `rl: {method}`; remove it")
    if cfg.get("skip_prepare_dataset"):
        raise ConfigError(
            "`skip_prepare_dataset: true` would keep pairs that are longer than `sequence_len`; remove it"
        )
    _check_offloading(cfg, method)
    block = parse_block(BLOCKS[method], cfg[method], method, folder)
    check_skipping(cfg, block.on_bad_loss)
    return block


def _check_offloading(cfg: Mapping[str, Any], method: str) -> None:
    """Refuse what Axolotl builds into its trainer of supervised training alone."""
    if cfg.get("layer_offloading"):
        raise ConfigError(f"`layer_offloading` does not work with `rl: {method}`; remove it")
    checkpointing = cfg.get("gradient_checkpointing")
    if isinstance(checkpointing, str) and checkpointing.startswith("offload"):
        key = f"gradient_checkpointing: {checkpointing}"
    elif cfg.get("activation_offloading") not in (None, False, "hidden_states"):
        key = f"activation_offloading: {cfg['activation_offloading']}"
    else:
        return
    raise ConfigError(
        f"`{key}` does not work with `rl: {method}`; set `gradient_checkpointing: true`, and for the CPU to hold what "
        "it keeps `activation_offloading: hidden_states`"
    )


def check_skipping(cfg: Mapping[str, Any], on_bad_loss: str | None) -> None:
    """Refuse to skip steps that are not made where a step can be skipped.

    Raises:
        ConfigError: naming what makes them.
    """
    optimizer = str(cfg.get("optimizer"))
    within_backward = "lomo" in optimizer or "layerwise" in optimizer
    if on_bad_loss == "skip" and (cfg.get("deepspeed") or cfg.get("fp16") or within_backward):
        raise ConfigError(
            "`on_bad_loss: skip` does not go with DeepSpeed or an optimizer that makes its steps in the backward pass, "
            "nor with `fp16`, whose loss scaling skips steps by itself; remove it"
        )


def attention_advice(cfg: Mapping[str, Any], method: str, block: MethodBlock) -> str | None:
    """What to tell of an attention implementation that cannot carry packed trees, where the YAML names one.

    Raises:
        ConfigError: where packed trees are asked for all the same.
    """
    old_keys = (key for key in _OLD_ATTENTION_KEYS if cfg.get(key))
    chosen = cfg.get("attn_implementation") or next(old_keys, None)
    if chosen is None or carries_trees(str(chosen)) or block.layout == "padded":
        return None
    choices = ", ".join(TREE_BACKENDS)
    if block.layout == "packed":
        raise ConfigError(
            f"`{method}.layout: packed` does not go with the attention implementation {chosen!r}; set "
            f"`attn_implementation` to one of {choices}, or drop `layout`"
        )
    return (
        f"The attention implementation {chosen!r} cannot carry packed trees, so padded rows are trained, which costs "
        f"more; set `attn_implementation` to one of {choices}."
    )


def checkpoint_advice(cfg: Mapping[str, Any]) -> str | None:
    """Advice on checkpoints that a run cannot be resumed from, or None."""
    fsdp = cfg.get("fsdp_config")
    if not isinstance(fsdp, Mapping) or not cfg.get("adapter"):
        return None
    version = cfg.get("fsdp_version") or fsdp.get("fsdp_version")
    if str(version) != "2" or fsdp.get("state_dict_type") != "FULL_STATE_DICT":
        return None
    return (
        "With FSDP2, an adapter and `fsdp_config.state_dict_type: FULL_STATE_DICT`, accelerate writes one rank's part "
        "of the adapter into a checkpoint, so a resumed run goes on from wrong weights; set it to SHARDED_STATE_DICT."
    )


def no_stray_block(cfg: Mapping[str, Any]) -> None:
    """Refuse a method's block under an `rl:` that would ignore it.

    Raises:
        ConfigError: naming block and `rl`.
    """
    for method in BLOCKS:
        if cfg.get(method) is not None:
            raise ConfigError(
                f"the block `{method}:` has no effect with `rl: {cfg.get('rl')}`; set `rl: {method}`, or drop the block"
            )


def parse_block(block: type[B], raw: Any, path: str, folder: Path | None = None) -> B:
    """Validate a YAML mapping as a block of ours.

    Args:
        block: what it must hold.
        raw: the mapping.
        path: its key, for messages.
        folder: below which it may name files of templates; None where it may name none.

    Raises:
        ConfigError: one line for each wrong key: where, what, and the mend.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"`{path}` must be a mapping of keys to values, not {raw!r}")
    try:
        return block.model_validate(dict(raw), context=folder and {"folder": folder})
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(block, raw, path, dict(details)) for details in error.errors())) from None


def _explain(block: type[Block], raw: Mapping[str, Any], path: str, error: dict[str, Any]) -> str:
    fields: Any = block
    keys = list(error["loc"])
    if keys[-1:] == ["[key]"] and error["type"] != "extra_forbidden":  # pydantic's mark of a key that is wrong itself
        keys.pop()
    where = path
    if keys[:1] == ["margins"] and len(keys) > 2:
        _, name, *keys = keys
        where, fields = f"{path}.margins.{name}", MARGINS[raw["margins"][name]["source"]]
    if keys[:1] == ["directives"] and len(keys) > 1:
        _, *keys = keys
        where, fields = f"{path}.directives", Directives
    where = "`" + ".".join([where, *map(str, keys)]) + "`"
    field = fields.model_fields.get(str(keys[0])) if keys else None
    expected = f". Meaning: {field.description}" if field and field.description else ""
    match error["type"]:
        case "extra_forbidden":
            known = ", ".join(fields.model_fields)
            return f"{where} is not a known key{_did_you_mean(str(keys[-1]), fields.model_fields)}; known are {known}"
        case "missing":
            return f"{where} is missing{expected}"
        case "unknown_source":
            return f"{where} needs a `source`, one of {', '.join(MARGINS)}, not {error['input']!r}"
        case "value_error":
            return f"{where}: {error['ctx']['error']}"
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            return f"{where}: {message}, not {error['input']!r}{expected}"


def _did_you_mean(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""

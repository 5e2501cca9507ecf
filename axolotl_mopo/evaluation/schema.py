"""Schema of `comparison.json` and of the responses' lines. Validates files of any origin."""

import math
from typing import Annotated, Any, Literal, NotRequired, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    model_validator,
    with_config,
)
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from axolotl_mopo.config.model_files import Manifest
from axolotl_mopo.data.rows import Message, TemplateInputs, prompt_content
from axolotl_mopo.data.tool_calls import tool_calls
from axolotl_mopo.evaluation.names import Name, check_objectives, check_policies
from axolotl_mopo.records import Record

_LEAST_TEMPERATURE = 1e-3
LARGEST = 1e30
"""The largest magnitude of a number, so that means, intervals and hypervolumes stay finite."""


def check_number(value: float) -> float:
    """Refuse a number that cannot be averaged and compared.

    Raises:
        ValueError: if it is not finite or larger than `LARGEST` in magnitude.
    """
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(f"it is {value:g}; it must be a finite number, at most {LARGEST:g} in magnitude")
    return value


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


def _check_temperature(temperature: float) -> float:
    if 0 < temperature < _LEAST_TEMPERATURE:
        raise ValueError(f"it must be 0, for greedy decoding, or at least {_LEAST_TEMPERATURE:g}")
    return temperature


Number = Annotated[float, AfterValidator(check_number)]
Text = Annotated[str, AfterValidator(_check_printable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Index = Annotated[int, Field(ge=0, lt=2**31)]

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass(frozen=True, config=ConfigDict(extra="forbid", **_STRICT))
class Sampling:
    """Sampling settings of the responses."""

    samples: PositiveInt = 1
    """Number of responses to each prompt."""
    max_new_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0), AfterValidator(_check_temperature)] = 1.0
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 42
    generation_config: Literal["neutral", "model"] = "neutral"
    """`neutral` ignores the model's own generation settings (`top_k`, penalties, ...); `model` uses them."""

    @property
    def exact(self) -> bool:
        """Whether responses are drawn from the policy's own distribution, so that log-ratios estimate its KL."""
        return self.temperature == 1 and self.top_p == 1 and self.generation_config == "neutral"


@dataclass(frozen=True, config=ConfigDict(extra="forbid", **_STRICT))
class PromptChoice:
    """Which of AMoPO's prompts to use: the integrated one, or a dimension's with a score, by default the best."""

    dimension: Text | None = None
    score: float | None = None


class PromptsRecord(Record):
    """The number of prompts and their digest."""

    count: PositiveInt
    digest: int


class PolicyRecord(Record):
    """A policy without its name. See `axolotl_mopo.evaluation.policies.Policy`."""

    path: Text
    kind: Literal["policy", "baseline", "reference"]
    base: Text | None = None
    reference: Text | None = None
    tokenizer: Text = ""
    digest: Text = ""
    manifest: Annotated[Manifest | None, BeforeValidator(lambda value: value or None)] = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class Objective(Record):
    """A scored objective."""

    scorer: dict[str, Any]
    digest: str
    lower_is_better: bool
    with_reasoning: bool = False
    """Whether the scorer read reasoning and answer, not the answer alone."""


class Settings(Record):
    """`comparison.json`. Settings that all responses have in common are None while there are no responses."""

    model_config = ConfigDict(extra="forbid")

    policies: dict[Name, PolicyRecord] = Field(default_factory=dict)
    objectives: dict[Name, Objective] = Field(default_factory=dict)
    prompts: PromptsRecord | None = None
    sampling: Sampling | None = None
    asking: PromptChoice | None = None
    reference: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template for all policies; None if each has those that it was trained with."""
    source: Text | None = None
    """Source of the prompts, for readers only."""

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        check_policies(self.policies)
        check_objectives(self.objectives)
        if [policy.kind for policy in self.policies.values()].count("reference") > 1:
            raise ValueError("several policies are of the kind reference; at most one is allowed")
        return self


def _turns(value: list[Message]) -> list[Message]:
    for number, turn in enumerate(value):
        calls = tool_calls(turn.get("tool_calls"), "prompt")
        for key in ("role", "content"):
            if not isinstance(turn.get(key), str) and not (key == "content" and calls and turn.get(key) is None):
                raise ValueError(f"turn {number} has no `{key}` that is a string")
        if not isinstance(turn.get("reasoning_content", ""), str):
            raise ValueError(f"turn {number} has a `reasoning_content` that is not a string")
    return value


@with_config(ConfigDict(extra="allow", **_STRICT))
class Response(TypedDict):
    """A line of a policy's file; every other key is an objective with its score."""

    prompt_id: Index
    sample: Index
    prompt: Annotated[list[Message], Field(min_length=1), AfterValidator(_turns)]
    tools: NotRequired[list[dict[str, Any]]]
    chat_template_kwargs: NotRequired[dict[str, Any]]
    response: str
    """The answer; empty if the response was cut off before it."""
    reasoning: NotRequired[str]
    """Its reasoning, without the marks of the chat template; empty if only these were generated."""
    reasoning_tokens: NotRequired[Index]
    """How many of its first tokens are reasoning or marks."""
    token_ids: Annotated[list[TokenId], Field(min_length=1)]
    finished: bool
    logp: NotRequired[Number]
    ref_logp: NotRequired[Number]


def inputs_of(row: Response) -> TemplateInputs:
    """What the chat template read besides the messages."""
    return TemplateInputs(row.get("tools", ()), row.get("chat_template_kwargs", {}))


def prompt_of(row: Response) -> Any:
    """The content of a response's prompt, to compare prompts by."""
    return prompt_content(row["prompt"], inputs_of(row))


def is_unanswered(row: Response) -> bool:
    """Whether a response ended inside its reasoning."""
    return "reasoning" in row and not row["response"].strip()


def response_key(row: Response) -> tuple[int, int]:
    """The key of a response within its policy: its prompt and its sample number."""
    return row["prompt_id"], row["sample"]


@with_config(_STRICT)
class Partial(TypedDict):
    """A line of an unfinished column."""

    prompt_id: Index
    sample: Index
    value: Number

"""Chooses the layout of a model's batches: checks its architecture, then compares its log-probs."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from axolotl_mopo.config.host_keys import TREE_BACKENDS, carries_trees
from axolotl_mopo.errors import NoiseError
from axolotl_mopo.logprobs.attention import plain_implementation, text_decoder, use_plain_attention, use_tree_attention
from axolotl_mopo.logprobs.computer import CompletionLogProbs, LogProbComputer, in_mode
from axolotl_mopo.logprobs.trees import Completion, Pair, pack, pad

_TREE_LAYERS = {"full_attention", "sliding_attention"}
_CHANGES_OF_LOGITS = (
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)
_PROBE_TOKENS = 64
_NOISE = re.compile(r"dropout|drop_?path|layer_?drop|^(input_)?jitter_noise$|^moe_jitter_eps$")
"""Attributes of modules that scale noise. Not Phi-3.5-MoE's `router_jitter_noise`, a threshold also in evaluation."""


@dataclass(frozen=True)
class Layout:
    """How a model's batches are laid out and where their log-probs are computed."""

    why_not_packed: str | None = None
    why_not_fused_head: str | None = None

    @property
    def packed(self) -> bool:
        """True for packed trees, False for padded rows."""
        return self.why_not_packed is None

    @property
    def fused_head(self) -> bool:
        """True if log-probs are computed within the forward pass, False if from the logits that it returns."""
        return self.why_not_fused_head is None


def why_not_trees(model: PreTrainedModel) -> str | None:
    """Return the reason why this architecture does not support packed trees, or None if it does."""
    decoder, config = text_decoder(model), model.config.get_text_config()
    implementation = plain_implementation(model)
    parameters = inspect.signature(model.forward).parameters
    if not carries_trees(implementation):
        return f"attn_implementation {implementation!r} is not one of {', '.join(TREE_BACKENDS)}"
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if decoder.config is not config:
        return "it has no text decoder with a config of its own"
    if not getattr(decoder, "_supports_attention_backend", False):
        return "its attention does not go through transformers' AttentionInterface"
    if getattr(decoder, "_is_stateful", False):
        return "it has recurrent layers"
    if other := set(getattr(config, "layer_types", None) or ()) - _TREE_LAYERS:
        return f"it has layers of type {', '.join(sorted(other))}"
    if any(hasattr(module, "sinks") for module in model.modules()):
        return "its attention has sinks"
    if getattr(config, "attn_temperature_tuning", None):
        return "its attention scales a query by its place in the row"
    if missing := {"position_ids", "logits_to_keep"} - set(parameters):
        return f"its forward does not accept {', '.join(sorted(missing))}"
    return None


def why_not_fused_head(base: PreTrainedModel) -> str | None:
    """Return the reason why the head of this architecture cannot return log-probs, or None if it can."""
    if base.get_output_embeddings() is None:
        return "it has no head of its own"
    config = base.config.get_text_config()
    if changed := [name for name in _CHANGES_OF_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]:
        return f"it changes the head's logits ({', '.join(changed)})"
    return None


def plan_layout(base: PreTrainedModel, wanted: str | None = None, compiled: bool = False) -> Layout:
    """Return the fastest layout that a model's architecture supports, without running the model.

    Args:
        base: the transformers model, without wrappers.
        wanted: `padded` for padded rows in any case.
        compiled: whether torch compiles the model. A compiled forward pass keeps the hooks that it was traced with.
    """
    no_trees = why_not_trees(base) if wanted != "padded" else "padded rows are requested"
    return Layout(no_trees, "it is compiled" if compiled else why_not_fused_head(base))


def require_layout(layout: Layout, base: PreTrainedModel, wanted: str | None) -> None:
    """Check that a layout is the requested one.

    Raises:
        ValueError: if packed trees are requested and the model does not support them.
    """
    if wanted == "packed" and not layout.packed:
        raise ValueError(f"{type(base).__name__} cannot be trained in packed trees: {layout.why_not_packed}")


def try_layout(
    plan: Layout,
    model: nn.Module,
    base: PreTrainedModel,
    items: Sequence[Pair | Completion],
    device: torch.device,
    tolerance: float,
) -> Layout:
    """Compare a planned layout with padded rows on the log-probs of a few completions.

    Every process that shares the weights must call this with the same items. Afterwards the model has its plain
    attention.

    Args:
        plan: the result of `plan_layout`.
        model: the model as it is run, with adapters and wrappers.
        base: the transformers model inside it.
        items: token ids of some pairs or completions; only short parts of them are used.
        device: device of the batches.
        tolerance: largest difference between two correct computations, in nats per token.

    Returns:
        The plan, without the parts that change the log-probs.

    Raises:
        NoiseError: if the model's log-probs differ between training and evaluation mode.
    """
    short = _shorten(items)
    padded = pad(short, pad_token_id=0)
    if plan.packed:
        use_tree_attention(base)

    def logps(computer: LogProbComputer, batch: dict[str, Any], training: bool = False) -> CompletionLogProbs:
        with torch.no_grad(), in_mode(model, training):
            return computer(model, _on(device, batch))

    expected = logps(LogProbComputer(), padded)

    def difference(one: CompletionLogProbs, other: CompletionLogProbs = expected) -> float:
        return ((one.logps - other.logps).abs() / other.lengths).max().item()

    def why_wrong(computer: LogProbComputer, batch: dict[str, Any], tolerance: float) -> str | None:
        try:
            found = difference(logps(computer, batch))
        except (RuntimeError, IndexError, ValueError) as error:
            return f"it fails: {error}"
        return None if found <= tolerance else f"token log-probs differ by {found:.2g}, more than {tolerance:g}"

    no_trees = plan.why_not_packed or why_wrong(LogProbComputer(), pack(short), tolerance)
    # The same batch with the same attention differs only by rounding.
    no_fused_head = plan.why_not_fused_head or why_wrong(LogProbComputer(base), padded, tolerance / 10)
    first, second = (logps(LogProbComputer(), padded, training=True) for _ in range(2))
    noise, shift = difference(first, second), difference(first)
    use_plain_attention(base)
    if not (noise <= tolerance / 10 and shift <= tolerance):
        raise NoiseError(
            f"the token log-probs of {type(base).__name__} differ by {noise:.2g} between two training passes, and by "
            f"{shift:.2g} between training and evaluation: the model adds noise in training (dropout, router noise, "
            "sampled experts), which would change the measured preferences"
        )
    return Layout(no_trees, no_fused_head)


def gives_aux_loss(model: nn.Module, item: Pair | Completion, device: torch.device, packed: bool) -> bool:
    """Whether a model returns a load-balancing loss if it is requested.

    Args:
        model: the model as it is run.
        item: token ids of a pair or a completion; only a short part of it is used.
        device: device of the batch.
        packed: whether batches are packed trees.
    """
    batch = pack(_shorten([item])) if packed else pad(_shorten([item]), pad_token_id=0)
    with torch.no_grad(), in_mode(model, training=False):
        _, aux_loss = LogProbComputer().with_aux_loss(model, _on(device, batch))
    return aux_loss is not None


def choose_layout(
    model: nn.Module, base: PreTrainedModel, items: Sequence[Pair | Completion], wanted: str | None = None
) -> Layout:
    """Plan a layout and try it. All weights of the model must be in this process.

    Args:
        model, base, items: as for `try_layout`.
        wanted: `packed` or `padded` to accept no other layout; None for the fastest one.

    Raises:
        ValueError: if packed trees are requested and the model does not support them.
        NoiseError: if the model's log-probs differ between training and evaluation mode.
    """
    parameter = next(model.parameters())
    tolerance = tolerance_of(parameter, torch.is_autocast_enabled(parameter.device.type))
    layout = try_layout(plan_layout(base, wanted), model, base, items, parameter.device, tolerance)
    require_layout(layout, base, wanted)
    return layout


def tolerance_of(parameter: torch.Tensor, mixed_precision: bool) -> float:
    """Return the largest difference between two correct computations, in nats per token.

    It is far below the difference that a wrong attention mask or wrong positions make.
    """
    full_precision = parameter.dtype in (torch.float32, torch.float64)
    return 0.01 if full_precision and not mixed_precision else 0.25


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}


def _shorten(items: Sequence[Pair | Completion]) -> list[Completion]:
    """Keep the ends of prompts and the beginnings of completions; only the first prompt of a pair."""
    completions = [one for item in items for one in item.completions[:2]]
    return [Completion(one.prompt[-_PROBE_TOKENS:], one.tokens[:_PROBE_TOKENS]) for one in completions]


def turn_off_noise(model: nn.Module) -> None:
    """Set every dropout and router noise of a model to 0, in place; its config stays as it is.

    Layers of transformers keep the dropout of their attention as a float attribute, not as an `nn.Dropout`.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _NOISE.search(name):
                setattr(module, name, 0.0)

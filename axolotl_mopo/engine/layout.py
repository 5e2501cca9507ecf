"""Which layout a model can take: a check of its architecture, then of its numbers."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from axolotl_mopo.engine import TREE_BACKENDS
from axolotl_mopo.engine.attention import TREE_PREFIX, use_plain_attention, use_tree_attention
from axolotl_mopo.engine.scoring import CompletionScores, Scorer, evaluating
from axolotl_mopo.engine.trees import Pair, pack, pad

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


@dataclass(frozen=True)
class Layout:
    """How a model's batches are laid out and scored."""

    packed: bool
    """In packed trees; in padded rows otherwise."""
    inside: bool
    """Log-probs are computed within the forward pass; from the logits that it returns otherwise."""
    why_not_packed: str | None = None
    why_not_inside: str | None = None


def why_not_trees(model: PreTrainedModel) -> str | None:
    """The reason why this architecture cannot take packed trees, or None where it can."""
    config = model.config
    implementation = (config._attn_implementation or "eager").removeprefix(TREE_PREFIX)
    parameters = inspect.signature(model.forward).parameters
    if implementation not in TREE_BACKENDS:
        return f"attn_implementation {implementation!r} is none of {', '.join(TREE_BACKENDS)}"
    if config.is_encoder_decoder or config.sub_configs:
        return "it is not a plain text decoder"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' AttentionInterface"
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers"
    if other := set(getattr(config, "layer_types", None) or ()) - _TREE_LAYERS:
        return f"it has layers of type {', '.join(sorted(other))}"
    if any(hasattr(module, "sinks") for module in model.modules()):
        return "its attention has sinks"
    if missing := {"position_ids", "logits_to_keep"} - set(parameters):
        return f"its forward takes no {', '.join(sorted(missing))}"
    return None


def why_not_inside(base: PreTrainedModel) -> str | None:
    """The reason why this architecture's head cannot answer with log-probs, or None where it can."""
    if base.get_output_embeddings() is None:
        return "it has no head of its own"
    config = base.config.get_text_config()
    if changed := [name for name in _CHANGES_OF_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]:
        return f"it changes the head's logits ({', '.join(changed)})"
    return None


def choose_layout(model: nn.Module, base: PreTrainedModel, pairs: Sequence[Pair], wanted: str | None = None) -> Layout:
    """Find the cheapest layout that gives a model's own numbers, by its architecture and by scoring a few pairs.

    Args:
        model: the model as it is trained, possibly with adapters; it is not switched over to trees yet.
        base: the transformers model inside it.
        pairs: token ids of some pairs; short parts of them are scored in every layout.
        wanted: `packed` or `padded`, to have no other.

    Raises:
        ValueError: where trees are wanted and the model cannot take them.
    """
    short = [_shorten(pair) for pair in pairs]
    parameter = next(model.parameters())
    tolerance = tolerance_of(parameter, torch.is_autocast_enabled(parameter.device.type))
    no_trees = why_not_trees(base) if wanted != "padded" else "padded rows are wanted"
    if no_trees is None:
        use_tree_attention(base)
    unscorable = any(parameter.is_meta or parameter.numel() == 0 for parameter in model.parameters())
    expected = None if unscorable else _evaluate(model, Scorer(), pad(short, pad_token_id=0))

    def why_wrong(scorer: Scorer, batch: dict[str, Any], tolerance: float) -> str | None:
        if expected is None:
            return None  # Its weights are on another rank, or not there yet.
        try:
            logps = _evaluate(model, scorer, batch).logps
        except (RuntimeError, IndexError, ValueError) as error:
            return f"it fails: {error}"
        difference = ((logps - expected.logps).abs() / expected.lengths).max().item()
        if difference <= tolerance:
            return None
        return f"token log-probs differ by {difference:.2g}, more than {tolerance:g}"

    no_trees = no_trees or why_wrong(Scorer(), pack(short), tolerance)
    # The same batch with the same attention differs by rounding alone.
    no_inside = why_not_inside(base) or why_wrong(Scorer(base), pad(short, pad_token_id=0), tolerance / 10)
    use_plain_attention(base)
    if wanted == "packed" and no_trees:
        raise ValueError(f"{type(base).__name__} cannot be trained in packed trees: {no_trees}")
    return Layout(no_trees is None, no_inside is None, no_trees, no_inside)


@torch.no_grad()
def _evaluate(model: nn.Module, scorer: Scorer, batch: dict[str, Any]) -> CompletionScores:
    device = next(model.parameters()).device
    with evaluating(model):
        return scorer(model, {name: value.to(device) for name, value in batch.items()})


def tolerance_of(parameter: torch.Tensor, mixed_precision: bool) -> float:
    """Nats a token by which two exact computations may differ, far below what a fault makes."""
    full_precision = parameter.dtype in (torch.float32, torch.float64)
    return 0.01 if full_precision and not mixed_precision else 0.25


def _shorten(pair: Pair) -> Pair:
    return Pair([pair.prompts[0][-_PROBE_TOKENS:]], pair.chosen[:_PROBE_TOKENS], pair.rejected[:_PROBE_TOKENS])

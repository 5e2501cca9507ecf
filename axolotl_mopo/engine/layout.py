"""Whether a model can take packed trees: a check of its architecture, then of its numbers."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from axolotl_mopo.engine.attention import TREE_BACKENDS, TREE_PREFIX, use_plain_attention, use_tree_attention
from axolotl_mopo.engine.scoring import score
from axolotl_mopo.engine.trees import Pair, pack, pad

_TREE_LAYERS = {"full_attention", "sliding_attention"}
_PROBE_TOKENS = 64


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


def accept_trees(model: nn.Module, base: PreTrainedModel, pair: Pair) -> str | None:
    """Switch a model over to tree attention if its architecture allows it and its numbers agree on one pair.

    Args:
        model: the model as it is trained, possibly with adapters.
        base: the transformers model inside it.
        pair: token ids of any pair; a short part of it is scored in both layouts.

    Returns:
        The reason why the model keeps to padded rows, or None where it now takes trees.
    """
    if reason := why_not_trees(base):
        return reason
    use_tree_attention(base)
    if any(parameter.is_meta or parameter.numel() == 0 for parameter in model.parameters()):
        return None  # Sharded before the first forward pass: nothing can be scored yet.
    difference = _largest_difference(model, _shorten(pair))
    parameter = next(model.parameters())
    tolerance = tolerance_of(parameter, torch.is_autocast_enabled(parameter.device.type))
    if difference <= tolerance:
        return None
    use_plain_attention(base)
    return f"packed and padded token log-probs differ by {difference:.2g}, more than {tolerance:g}"


@torch.no_grad()
def _largest_difference(model: nn.Module, pair: Pair) -> float:
    device = next(model.parameters()).device
    with _evaluating(model):
        packed, padded = (
            score(model, {name: value.to(device) for name, value in batch.items()})
            for batch in (pack([pair]), pad([pair], pad_token_id=0))
        )
    difference = ((packed.logps - padded.logps).abs() / padded.lengths).max().item()
    return difference if difference == difference else float("inf")


def tolerance_of(parameter: torch.Tensor, mixed_precision: bool) -> float:
    """Nats a token by which two exact computations may differ, far below what a fault makes."""
    full_precision = parameter.dtype in (torch.float32, torch.float64)
    return 0.01 if full_precision and not mixed_precision else 0.25


def _shorten(pair: Pair) -> Pair:
    return Pair([pair.prompts[0][-_PROBE_TOKENS:]], pair.chosen[:_PROBE_TOKENS], pair.rejected[:_PROBE_TOKENS])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

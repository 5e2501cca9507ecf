"""One forward pass over a batch -> log-prob and token-probability statistics of every completion."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask", "segments", "logits_to_keep")


class CompletionScores(NamedTuple):
    """What a model thinks of C completions; only `logps` carries a gradient."""

    logps: Tensor
    """Log-probability of the whole completion, [C]."""
    prob_mean: Tensor
    """Mean probability of its tokens, [C]."""
    prob_std: Tensor
    """Standard deviation of its tokens' probabilities, n - 1 in the denominator, 0 for a single token, [C]."""
    lengths: Tensor
    """Number of its tokens, [C]."""


def by_side(scores: CompletionScores, prompts: int) -> tuple[CompletionScores, CompletionScores]:
    """The scores of the chosen and of the rejected completions, each [B, D], for pairs of D prompts."""
    sides = [values.view(-1, prompts, 2) for values in scores]
    return CompletionScores(*(v[..., 0] for v in sides)), CompletionScores(*(v[..., 1] for v in sides))


def score(model: nn.Module, batch: Mapping[str, Any]) -> CompletionScores:
    """Score a batch of `pack` or `pad`, computing logits only where they predict a completion token.

    Args:
        model: a causal language model, possibly wrapped (PEFT, DDP, FSDP).
        batch: a batch on the model's device.
    """
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    logps = token_logps(logits, batch["predictors"], batch["targets"])
    return completion_scores(logps, batch["completion_ids"], batch["lengths"])


def token_logps(logits: Tensor, predictors: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target under its row of logits, in float32 or finer: [K, V], [N], [N] -> [N]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[predictors, targets] - logits.logsumexp(-1)[predictors]


def completion_scores(logps: Tensor, completion_ids: Tensor, lengths: Tensor) -> CompletionScores:
    """Per-token log-probs [N] -> per-completion scores [C] by segment sums on the tokens' device."""

    def total(per_token: Tensor) -> Tensor:
        return torch.zeros_like(lengths, dtype=per_token.dtype).index_add(0, completion_ids, per_token)

    probs = logps.detach().exp()
    prob_mean = total(probs) / lengths
    prob_variance = total((probs - prob_mean[completion_ids]) ** 2) / (lengths - 1).clamp(min=1)
    return CompletionScores(total(logps), prob_mean, prob_variance.sqrt(), lengths)

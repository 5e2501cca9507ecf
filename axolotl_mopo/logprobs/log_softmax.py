"""Log-probs of selected tokens from logits over the whole vocabulary, with little memory besides the logits."""

from typing import Any

import torch
from torch import Tensor

_BYTES_AT_ONCE = 1 << 20
"""Size of a block of logits that is processed at once, so that it fits into the cache of a CPU core."""


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probs of selected entries of every row of logits: [..., V], [..., K] -> [..., K].

    The backward pass overwrites the logits with their gradient, so no other backward pass may need them afterwards;
    torch raises an error if one does.
    """
    flat, columns = logits.reshape(-1, logits.shape[-1]), index.reshape(-1, index.shape[-1])
    logps: Tensor = _SelectiveLogSoftmax.apply(flat, columns)
    return logps.view(index.shape)


class _SelectiveLogSoftmax(torch.autograd.Function):
    """[N, V], [N, K] -> [N, K]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        normalisers = torch.cat([rows.logsumexp(-1, keepdim=True) for rows in logits.split(_rows_at_once(logits))])
        ctx.save_for_backward(logits, index, normalisers)
        return logits.gather(-1, index) - normalisers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        logits, index, normalisers = ctx.saved_tensors
        totals = gradient.sum(-1, keepdim=True)
        size = _rows_at_once(logits)
        parts = (tensor.split(size) for tensor in (logits, index, normalisers, totals, gradient))
        for rows, columns, normaliser, total, own in zip(*parts, strict=True):
            # d logp_k / d logit_v = [v = k] - prob_v
            rows.sub_(normaliser).exp_().mul_(-total).scatter_add_(-1, columns, own)
        return logits, None


def _rows_at_once(logits: Tensor) -> int:
    return max(1, _BYTES_AT_ONCE // (logits.shape[-1] * logits.element_size()))

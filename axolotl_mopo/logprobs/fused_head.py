"""The head of a model that answers with log-probs instead of logits, within the model's own forward pass.

The log-probs must be computed there and not from the logits that the model returns: only within the wrapped forward
pass are sharded weights gathered, mixed precision then turns log-probs and not logits into float32, and logits are made
only for the positions that predict a completion token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

SOFT_CAP = "final_logit_softcapping"

LogProbs = Callable[[Tensor, Tensor], Tensor]
"""Logits [P, V] and targets [P, K] -> log-probs [P, K]."""


@contextmanager
def fused_head(
    base: PreTrainedModel,
    rows: Tensor | None,
    targets: Tensor,
    logps: LogProbs,
    rows_at_once: int | None,
    as_complex: bool,
) -> Iterator[None]:
    """Let a model's head answer with log-probs [1, P, K] instead of logits, for a while.

    Args:
        base: the transformers model.
        rows: which of the flattened hidden states predict, [P]; None for all of them.
        targets: the tokens that each of them predicts, [P, K].
        logps: computes log-probs from logits.
        rows_at_once: above how many rows the head runs in chunks, whose logits are computed a second time in the
            backward pass; None for no limit.
        as_complex: gives the log-probs an imaginary part of 0. FSDP2 casts what a module returns to half precision, but
            no complex numbers.
    """
    head = base.get_output_embeddings()
    with _without_soft_cap(base.config.get_text_config()) as cap:
        hooks = _Hooks(rows, targets, _capped(logps, cap), rows_at_once or len(targets), as_complex)
        # The hooks of wrappers run outside of these two.
        handles = [
            head.register_forward_pre_hook(hooks.choose_rows),
            head.register_forward_hook(hooks.answer, prepend=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Hooks:
    """Two hooks around the head.

    Chunks are run by calling the head again from within its own forward hook: its hooks of LoRA and FSDP must run for
    each chunk, so its weight cannot be used directly. These two hooks leave such calls alone.
    """

    def __init__(
        self, rows: Tensor | None, targets: Tensor, logps: LogProbs, rows_at_once: int, as_complex: bool
    ) -> None:
        self.rows, self.targets, self.logps = rows, targets, logps
        self.rows_at_once, self.as_complex = rows_at_once, as_complex
        self.chunks: tuple[Tensor, ...] = ()
        self.runs_chunks = False

    def choose_rows(self, head: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        """Give the head the hidden states that predict; one of them where `answer` runs them in chunks."""
        if self.runs_chunks:
            return None
        self.chunks = chosen_rows(args[0], self.rows).split(self.rows_at_once)
        first = self.chunks[0][None]
        return first if len(self.chunks) == 1 else first[:, :1]

    def answer(self, head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor | None:
        """Turn the logits into log-probs."""
        if self.runs_chunks:
            return None
        in_one = len(self.chunks) == 1
        logps = self.logps(logits.squeeze(0), self.targets)[None] if in_one else self._run_chunks(head)
        return torch.complex(logps, torch.zeros_like(logps)) if self.as_complex else logps

    def _run_chunks(self, head: nn.Module) -> Tensor:
        def chunk_logps(hidden: Tensor, targets: Tensor) -> Tensor:
            return self.logps(head(hidden[None]).squeeze(0), targets)

        self.runs_chunks = True
        parts = zip(self.chunks, self.targets.split(self.rows_at_once), strict=True)
        return torch.cat([_recomputed(chunk_logps, *part) for part in parts])[None]


def chosen_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """Some of the rows of [B, L, ...] -> [P, ...]."""
    flat = values.flatten(0, 1)
    return flat if rows is None else flat[rows]


def _recomputed(function: LogProbs, hidden: Tensor, targets: Tensor) -> Tensor:
    """The function's result; what its gradient needs is computed a second time in the backward pass and not kept."""
    result = checkpoint(function, hidden, targets, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)  # noqa: S101 (torch says Any or None)
    return result


def _capped(logps: LogProbs, cap: float | None) -> LogProbs:
    """Log-probs of logits that are capped first, in float32 or finer, as the model would cap them."""
    if cap is None:
        return logps

    def capped(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logps(cap * torch.tanh(logits / cap), targets)

    return capped


@contextmanager
def _without_soft_cap(config: PreTrainedConfig) -> Iterator[float | None]:
    """Keep the model from capping what its head answers, for a while; gives the cap."""
    cap = getattr(config, SOFT_CAP, None)
    if cap is None:
        yield None
        return
    setattr(config, SOFT_CAP, None)
    try:
        yield cap
    finally:
        setattr(config, SOFT_CAP, cap)

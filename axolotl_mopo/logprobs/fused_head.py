"""Makes the head of a model return log-probs instead of logits, within the model's own forward pass.

There are three reasons not to compute them from the logits that the model returns. Sharded weights are gathered only
within the wrapped forward pass. Mixed precision casts what the forward pass returns to float32, and log-probs are much
smaller than logits. Logits are made only for the positions that predict a completion token.
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
    """Context manager in which a model's head returns log-probs [1, P, K] instead of logits.

    Args:
        base: the transformers model.
        rows: which of the flattened hidden states predict a completion token, [P]; None for all of them.
        targets: the tokens that each of them predicts, [P, K].
        logps: computes log-probs from logits.
        rows_at_once: the largest number of rows in one call of the head; more rows run in chunks, whose logits are
            recomputed in the backward pass. None for no limit.
        as_complex: add an imaginary part of 0 to the log-probs. FSDP2 casts real outputs of a module to half
            precision, but not complex ones.
    """
    head = base.get_output_embeddings()
    with _without_soft_cap(base.config.get_text_config()) as cap:
        hooks = _Hooks(rows, targets, _capped(logps, cap), rows_at_once or len(targets), as_complex)
        # Hooks of wrappers must run before the first and after the second.
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
    """A forward pre-hook and a forward hook of the head.

    For each chunk the forward hook calls the head again instead of using its weight, since LoRA and the hooks of FSDP
    must run for each chunk. During these calls the two hooks here do nothing.
    """

    def __init__(
        self, rows: Tensor | None, targets: Tensor, logps: LogProbs, rows_at_once: int, as_complex: bool
    ) -> None:
        self.rows, self.targets, self.logps = rows, targets, logps
        self.rows_at_once, self.as_complex = rows_at_once, as_complex
        self.chunks: tuple[Tensor, ...] = ()
        self.runs_chunks = False

    def choose_rows(self, head: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        """Select the hidden states that predict a completion token; only the first one if `answer` runs chunks."""
        if self.runs_chunks:
            return None
        self.chunks = chosen_rows(args[0], self.rows).split(self.rows_at_once)
        first = self.chunks[0][None]
        return first if len(self.chunks) == 1 else first[:, :1]

    def answer(self, head: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor | None:
        """Replace the logits by log-probs."""
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
    """Flatten [B, L, ...] and select rows: -> [P, ...]."""
    flat = values.flatten(0, 1)
    return flat if rows is None else flat[rows]


def _recomputed(function: LogProbs, hidden: Tensor, targets: Tensor) -> Tensor:
    """Call the function with activation checkpointing."""
    result = checkpoint(function, hidden, targets, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)  # noqa: S101 (annotated as Any or None in torch)
    return result


def _capped(logps: LogProbs, cap: float | None) -> LogProbs:
    """Wrap `logps` so that it caps the logits first, in float32 or finer, as the model does."""
    if cap is None:
        return logps

    def capped(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logps(cap * torch.tanh(logits / cap), targets)

    return capped


@contextmanager
def _without_soft_cap(config: PreTrainedConfig) -> Iterator[float | None]:
    """Context manager that turns off the model's own cap on logits and yields the cap."""
    cap = getattr(config, SOFT_CAP, None)
    if cap is None:
        yield None
        return
    setattr(config, SOFT_CAP, None)
    try:
        yield cap
    finally:
        setattr(config, SOFT_CAP, cap)

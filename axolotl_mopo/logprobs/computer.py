"""Computes log-probs and token-probability statistics of every completion of a batch in one forward pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from axolotl_mopo.logprobs.fused_head import SOFT_CAP, chosen_rows, fused_head
from axolotl_mopo.logprobs.log_softmax import selective_log_softmax

MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask", "segments", "logits_to_keep")

_BYTES_PER_LOGIT = 12
"""Upper bound for a logit, its float32 copy and its gradient; twice as much if logits are capped."""


class CompletionLogProbs(NamedTuple):
    """Log-probs and token-probability statistics of C completions; only `logps` has a gradient."""

    logps: Tensor
    """Log-probability of the whole completion, [C]."""
    prob_mean: Tensor
    """Mean token probability, [C]."""
    prob_std: Tensor
    """Sample standard deviation of the token probabilities (n - 1 in the denominator); 0 for a single token, [C]."""
    lengths: Tensor
    """Number of tokens, [C]."""


def by_side(logprobs: CompletionLogProbs, prompts: int) -> tuple[CompletionLogProbs, CompletionLogProbs]:
    """Split into chosen and rejected completions, each [B, D], for pairs of D prompts."""
    sides = [values.view(-1, prompts, 2) for values in logprobs]
    return CompletionLogProbs(*(v[..., 0] for v in sides)), CompletionLogProbs(*(v[..., 1] for v in sides))


def joined(parts: Sequence[CompletionLogProbs]) -> CompletionLogProbs:
    """Concatenate the log-probs of several batches."""
    return parts[0] if len(parts) == 1 else CompletionLogProbs(*map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class LogProbComputer:
    """Computes the log-probs of batches made by `pack` or `pad`; logits are made only for completion tokens.

    Args:
        base: the transformers model inside the model that is run; its head returns log-probs within the forward pass
            (see `fused_head`). None computes them from the logits that the forward pass returns.
        logits_budget: bytes that logits and their gradient may take before the head runs in chunks, whose logits are
            recomputed in the backward pass; None for no limit. Used only with `base`.
        log_softmax: computes log-probs from logits in float32 or finer, like `selective_log_softmax`.
    """

    base: PreTrainedModel | None = None
    logits_budget: float | None = None
    log_softmax: Callable[[Tensor, Tensor], Tensor] = selective_log_softmax

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> CompletionLogProbs:
        """Compute the log-probs of the C completions of a batch on the model's device.

        Args:
            model: a causal language model, possibly wrapped (PEFT, DDP, FSDP).
            batch: made by `pack` or `pad`.
        """
        return self._run(model, batch)[0]

    def with_aux_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[CompletionLogProbs, Tensor | None]:
        """Like `__call__`, but also return the load-balancing loss of a mixture of experts, without its coefficient.

        A token that several sequences share counts once for each of them. The loss is None if the model has none.
        """
        logprobs, outputs = self._run(model, batch, output_router_logits=True)
        aux_loss = getattr(outputs, "aux_loss", None)
        return logprobs, aux_loss.float() if isinstance(aux_loss, Tensor) else None

    def _run(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> tuple[CompletionLogProbs, Any]:
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch} | options
        _mark_free_lengths(inputs)
        rows, targets = batch.get("rows"), batch["targets"]
        if self.base is None:
            outputs = model(**inputs, use_cache=False)
            logps = self._logps(chosen_rows(outputs.logits, rows), targets)
        else:
            # FSDP2 casts real outputs of a module to half precision, but not complex ones.
            rows_at_once = self._rows_at_once(self.base.config.get_text_config())
            with fused_head(self.base, rows, targets, self._logps, rows_at_once, isinstance(model, FSDPModule)):
                outputs = model(**inputs, use_cache=False)
            logps = outputs.logits.real if outputs.logits.is_complex() else outputs.logits
        logps = logps.flatten()[batch["predictors"]]
        return completion_logprobs(logps, batch["completion_ids"], batch["lengths"]), outputs

    def _rows_at_once(self, config: PreTrainedConfig) -> int | None:
        if self.logits_budget is None:
            return None
        each = _BYTES_PER_LOGIT if getattr(config, SOFT_CAP, None) is None else 2 * _BYTES_PER_LOGIT
        return max(1, int(self.logits_budget / (each * config.vocab_size)))

    def _logps(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the log-probs of targets in float32 or finer: [P, V], [P, K] -> [P, K]."""
        # Half-precision logits would give half-precision log-probs.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.log_softmax(logits[None], targets[None]).squeeze(0)


def _mark_free_lengths(inputs: Mapping[str, Any]) -> None:
    """Mark the lengths as dynamic for torch.compile, since they differ from batch to batch."""
    segments = inputs.get("segments")
    own = (segments.key_index, segments.cu_seq_q, segments.cu_seq_k) if segments else ()
    for tensor in (*(value for value in inputs.values() if isinstance(value, Tensor)), *own):
        torch._dynamo.maybe_mark_dynamic(tensor, tensor.ndim - 1)


def completion_logprobs(logps: Tensor, completion_ids: Tensor, lengths: Tensor) -> CompletionLogProbs:
    """Reduce log-probs of N tokens to C completions by segment sums, in float32 or finer."""
    logps = logps.to(torch.promote_types(logps.dtype, torch.float32))

    def total(per_token: Tensor) -> Tensor:
        return torch.zeros_like(lengths, dtype=per_token.dtype).index_add(0, completion_ids, per_token)

    probs = logps.detach().exp()
    prob_mean = total(probs) / lengths
    prob_variance = total((probs - prob_mean[completion_ids]) ** 2) / (lengths - 1).clamp(min=1)
    return CompletionLogProbs(total(logps), prob_mean, prob_variance.sqrt(), lengths)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Context manager that puts the model into training or evaluation mode and restores its mode afterwards."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)

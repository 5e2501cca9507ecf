"""One forward pass over a batch -> log-prob and token-probability statistics of every completion."""

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
"""Of a logit, its float32 copy and its gradient, at most; twice as much where logits are capped."""


class CompletionLogProbs(NamedTuple):
    """What a model thinks of C completions; only `logps` carries a gradient."""

    logps: Tensor
    """Log-probability of the whole completion, [C]."""
    prob_mean: Tensor
    """Mean probability of its tokens, [C]."""
    prob_std: Tensor
    """Standard deviation of its tokens' probabilities, n - 1 in the denominator, 0 for a single token, [C]."""
    lengths: Tensor
    """Number of its tokens, [C]."""


def by_side(scores: CompletionLogProbs, prompts: int) -> tuple[CompletionLogProbs, CompletionLogProbs]:
    """The scores of the chosen and of the rejected completions, each [B, D], for pairs of D prompts."""
    sides = [values.view(-1, prompts, 2) for values in scores]
    return CompletionLogProbs(*(v[..., 0] for v in sides)), CompletionLogProbs(*(v[..., 1] for v in sides))


def joined(parts: Sequence[CompletionLogProbs]) -> CompletionLogProbs:
    """The scores of several batches' completions, one batch after the other."""
    return parts[0] if len(parts) == 1 else CompletionLogProbs(*map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class LogProbComputer:
    """Scores batches of `pack` or `pad`, with logits only where they predict a completion token.

    Args:
        base: the transformers model inside the model that is run, whose head is asked within its forward pass; None
            takes the logits that the forward pass returns.
        logits_budget: bytes that logits and their gradient may take before the head runs in chunks, whose logits are
            computed a second time in the backward pass; None sets no limit. Heeded with `base` alone.
        log_softmax: computes log-probs as `selective_log_softmax` does, from logits in float32 or finer.
    """

    base: PreTrainedModel | None = None
    logits_budget: float | None = None
    log_softmax: Callable[[Tensor, Tensor], Tensor] = selective_log_softmax

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> CompletionLogProbs:
        """The scores of the C completions of a batch on the model's device.

        Args:
            model: a causal language model, possibly wrapped (PEFT, DDP, FSDP).
            batch: of `pack` or `pad`.
        """
        return self._run(model, batch)[0]

    def with_aux_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[CompletionLogProbs, Tensor | None]:
        """The same, and the load-balancing loss of a mixture of experts without its coefficient, None if it has none.

        Tokens that several sequences share count as often as they would in rows of their own.
        """
        scores, outputs = self._run(model, batch, output_router_logits=True)
        aux_loss = getattr(outputs, "aux_loss", None)
        return scores, aux_loss.float() if isinstance(aux_loss, Tensor) else None

    def _run(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> tuple[CompletionLogProbs, Any]:
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch} | options
        _mark_free_lengths(inputs)
        rows, targets = batch.get("rows"), batch["targets"]
        if self.base is None:
            outputs = model(**inputs, use_cache=False)
            logps = self._logps(chosen_rows(outputs.logits, rows), targets)
        else:
            # FSDP2 casts what a module returns to half precision, but no complex numbers.
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
        """Log-probs of targets under their rows of logits, in float32 or finer: [P, V], [P, K] -> [P, K]."""
        # Half-precision logits would give half-precision log-probs.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.log_softmax(logits[None], targets[None]).squeeze(0)


def _mark_free_lengths(inputs: Mapping[str, Any]) -> None:
    """Tell torch.compile, if the model goes through it, that these lengths differ from batch to batch."""
    segments = inputs.get("segments")
    own = (segments.key_index, segments.cu_seq_q, segments.cu_seq_k) if segments else ()
    for tensor in (*(value for value in inputs.values() if isinstance(value, Tensor)), *own):
        torch._dynamo.maybe_mark_dynamic(tensor, tensor.ndim - 1)


def completion_logprobs(logps: Tensor, completion_ids: Tensor, lengths: Tensor) -> CompletionLogProbs:
    """Per-token log-probs [N] -> per-completion scores [C] by segment sums on the tokens' device, at least float32."""
    logps = logps.to(torch.promote_types(logps.dtype, torch.float32))

    def total(per_token: Tensor) -> Tensor:
        return torch.zeros_like(lengths, dtype=per_token.dtype).index_add(0, completion_ids, per_token)

    probs = logps.detach().exp()
    prob_mean = total(probs) / lengths
    prob_variance = total((probs - prob_mean[completion_ids]) ** 2) / (lengths - 1).clamp(min=1)
    return CompletionLogProbs(total(logps), prob_mean, prob_variance.sqrt(), lengths)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or in evaluation mode, for a while."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)

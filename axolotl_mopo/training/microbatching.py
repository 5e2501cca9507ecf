"""Runs a micro-batch in several passes, with the loss and the gradients of a single pass over all its pairs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from axolotl_mopo.logprobs.computer import CompletionLogProbs, LogProbComputer, joined
from axolotl_mopo.logprobs.passes import PassCounts

Collated = dict[str, Any]
"""A batch made by `PairCollator`."""
Inputs = Mapping[str, Any]
"""The inputs of one pass, made by `lay_out`."""


@dataclass(frozen=True)
class Part:
    """A part of a micro-batch: b whole pairs, or some prompts of one pair."""

    pairs: Tensor
    """Indices of the pairs in the micro-batch, [b]."""
    size: int
    """Number of pairs in the whole micro-batch."""
    prompts: tuple[int, int] | None
    """Range of prompts (end excluded) for a part of one pair; None for whole pairs."""
    rows: Tensor | None
    """Numbers of the prepared rows, [b]; None if the rows have no numbers."""


Losses = Callable[[CompletionLogProbs, Part], Tensor]
"""Log-probs of the completions of a part, and the part -> losses of its pairs, [b]."""


@dataclass(frozen=True)
class Forward:
    """The passes of a part of the micro-batch, and how its loss is computed from them."""

    passes: Sequence[Inputs]
    part: Part
    losses: Losses | None = None
    """None for the losses of the method, which are also recorded."""
    aux_weight: float | None = None
    """Weight of the load-balancing loss, in pairs; None for the number of pairs in the part."""


class MicrobatchMixin(Trainer):
    """Runs the passes of `PairCollator`'s batches, in training and in evaluation. A subclass defines the losses."""

    logprob_computer: LogProbComputer
    pass_counts: PassCounts
    aux_loss_coef: float
    """Coefficient of the load-balancing loss of a mixture of experts; 0 for a model without this loss."""
    args: Any
    model: Any
    optimizer: Any

    def pair_losses(self, logprobs: CompletionLogProbs, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute losses [b] and metrics, each [b], from the log-probs of all completions of b pairs."""
        raise NotImplementedError

    def prompt_losses(self, whole: CompletionLogProbs, part: Part) -> Losses:
        """Return the function that computes the loss of some prompts of a pair that is split into several passes.

        Args:
            whole: log-probs of all completions of the pair, without gradient.
            part: the pair.
        """
        raise NotImplementedError

    def record(self, metrics: Mapping[str, Tensor], part: Part) -> None:
        """Record `loss` and the method's metrics of b pairs, each [b]; called once for every pair."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Collated | list[Forward],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute what the parts in `inputs` contribute to the mean loss over the pairs of their micro-batch.

        Args:
            model: the model as it is run.
            inputs: a collated batch, or forwards that `training_step` has made from it.
            return_outputs: also return an empty mapping; there are no outputs.
            num_items_in_batch: not used, since the loss is a mean over pairs.
        """
        forwards = inputs if isinstance(inputs, list) else _forwards(inputs)
        contributions = []
        for forward in forwards:
            part = forward.part
            logprobs, aux_loss = self._run(model, forward.passes)
            losses = forward.losses(logprobs, part) if forward.losses else self._recorded(logprobs, part, aux_loss)
            contributions.append(losses.sum())
            if aux_loss is not None:
                weight = len(part.pairs) if forward.aux_weight is None else forward.aux_weight
                contributions.append(self.aux_loss_coef * weight * aux_loss)
        loss = torch.stack(contributions).sum() / forwards[0].part.size
        return (loss, {}) if return_outputs else loss

    def _run(self, model: nn.Module, passes: Sequence[Inputs]) -> tuple[CompletionLogProbs, Tensor | None]:
        """Return the log-probs of the completions of some passes, and the mean of the load-balancing losses, if any."""
        if not self.aux_loss_coef:
            return joined([self.logprob_computer(model, one) for one in passes]), None
        parts, aux_losses = zip(*(self.logprob_computer.with_aux_loss(model, one) for one in passes), strict=True)
        return joined(parts), torch.stack([loss for loss in aux_losses if loss is not None]).mean()

    def _recorded(self, logprobs: CompletionLogProbs, part: Part, aux_loss: Tensor | None) -> Tensor:
        losses, metrics = self.pair_losses(logprobs, part)
        if aux_loss is not None:
            metrics["aux_loss"] = aux_loss.expand_as(losses)
        self.record({"loss": losses, **metrics}, part)
        return losses

    def training_step(
        self, model: nn.Module, inputs: Collated, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward for one part after the other; ranks synchronize gradients at the last one."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free optimizers have other weights in evaluation
        *forwards, last = self._training_forwards(model, self._prepare_inputs(inputs))
        state, loss = self.accelerator.gradient_state, torch.zeros((), device=self.args.device)
        sync_gradients = state.sync_gradients
        for forward in forwards:
            with self._no_sync(model):
                state._set_sync_gradients(False)
                loss += self._backward(model, forward, num_items_in_batch)
            state._set_sync_gradients(sync_gradients)
        return loss + self._backward(model, last, num_items_in_batch)

    def _backward(self, model: nn.Module, forward: Forward, num_items_in_batch: Tensor | int | None) -> Tensor:
        inputs: Any = [forward]  # transformers passes it on to `compute_loss`
        return super().training_step(model, inputs, num_items_in_batch)

    def _no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context manager without gradient synchronization; it does nothing if every pass must synchronize."""
        state, deepspeed = self.accelerator.gradient_state, DistributedType.DEEPSPEED
        always = state.plugin_kwargs.get("sync_each_batch") or self.accelerator.distributed_type == deepspeed
        return self.accelerator.no_sync(model) if state.sync_gradients and not always else nullcontext()

    def _training_forwards(self, model: nn.Module, inputs: Collated) -> list[Forward]:
        """Make the list of forwards to run one after the other, as many on every rank.

        The loss of each prompt of a split pair needs the log-probs of all its prompts, so these are computed first,
        without gradient.
        """
        forwards = _forwards(inputs)
        whole = [forward for forward in forwards if len(forward.passes) == 1]
        split = [forward for forward in forwards if len(forward.passes) > 1]
        parts = sum(len(forward.passes) for forward in split)
        dummy_parts, dummy_forwards = self.pass_counts.missing(parts, len(whole) + parts)
        with torch.no_grad(), self.compute_loss_context_manager():
            for forward in split:
                whole += self._split(model, forward, inputs)
            self._run_dummies(model, inputs, dummy_parts)
        dummy = Forward(inputs["groups"][-1][-1:], forwards[-1].part, _no_losses, aux_weight=0)
        return whole + [dummy] * dummy_forwards

    def _split(self, model: nn.Module, forward: Forward, inputs: Collated) -> list[Forward]:
        """Make one forward for each pass of a split pair."""
        logprobs, aux_loss = self._run(model, forward.passes)
        self._recorded(logprobs, forward.part, aux_loss)
        losses = self.prompt_losses(logprobs, forward.part)
        aux_weight = 1 / len(forward.passes)
        return [Forward([one], _part(inputs, one), losses, aux_weight) for one in forward.passes]

    def _run_dummies(self, model: nn.Module, inputs: Collated, passes: int) -> None:
        """Run dummy forward passes while other ranks run real ones."""
        for _ in range(passes):
            self.logprob_computer(model, inputs["groups"][-1][-1])

    def prediction_step(
        self, model: nn.Module, inputs: Collated, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute loss and metrics of an evaluation batch; there are no predictions to gather."""
        inputs = self._prepare_inputs(inputs)
        (dummies,) = self.pass_counts.missing(sum(map(len, inputs["groups"])))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            self._run_dummies(model, inputs, dummies)
        return loss, None, None

    def floating_point_ops(self, inputs: Collated) -> int:
        """Sum transformers' estimate over all passes."""
        flops = super().floating_point_ops
        return sum(flops(one) for group in inputs["groups"] for one in group)

    def _track_num_input_tokens(self, inputs: Collated) -> None:
        for group in inputs["groups"]:
            for one in group:
                super()._track_num_input_tokens({"input_ids": one["input_ids"]})


def _forwards(inputs: Collated) -> list[Forward]:
    """Make one forward for each group of passes of a collated batch."""
    return [Forward(passes, _part(inputs, passes[0], whole=True)) for passes in inputs["groups"]]


def _part(inputs: Collated, one: Inputs, whole: bool = False) -> Part:
    """Return the part of a collated batch that a pass computes; with `whole`, its pairs with all prompts."""
    rows = inputs.get("pair_index")
    pairs = one["pairs"]
    return Part(pairs, inputs["size"], None if whole else one["prompts"], None if rows is None else rows[pairs])


def _no_losses(logprobs: CompletionLogProbs, part: Part) -> Tensor:
    """Zero losses of a dummy forward, with a gradient of zeros."""
    return logprobs.logps * 0

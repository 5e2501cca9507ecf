"""How a micro-batch is stepped: pass by pass, with the loss and the gradients of a single pass over all its pairs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from axolotl_mopo.engine.ranks import PassCounts
from axolotl_mopo.engine.scoring import CompletionScores, Scorer, joined

Batch = dict[str, Any]
Losses = Callable[[CompletionScores, Batch], Tensor]
"""Scores of completions, and the batch with `pairs` and `prompts` of their pass -> losses of its pairs [b]."""


class SteppingMixin(Trainer):
    """Runs the passes that `PairCollator` lays out, in training and in evaluation. A child gives the losses."""

    scorer: Scorer
    pass_counts: PassCounts
    aux_loss_coef: float
    """Of the load-balancing loss of a mixture of experts; 0 where the model has none."""
    args: Any
    model: Any
    optimizer: Any

    def pair_losses(self, scores: CompletionScores, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The method: scores of the completions of b pairs -> losses [b] and metrics, each [b].

        Args:
            scores: of all completions of the pairs.
            inputs: the batch, and `pairs` [b], the pairs' numbers in it.
        """
        raise NotImplementedError

    def prompt_losses(self, whole: CompletionScores, inputs: Batch) -> Losses:
        """What gives the loss of some of a pair's prompts, where its prompts do not fit into one pass.

        Args:
            whole: of all completions of the pair, without gradient.
            inputs: the batch, and `pairs` [1].
        """
        raise NotImplementedError

    def record(self, metrics: Mapping[str, Tensor], inputs: Batch) -> None:
        """Take metrics of b pairs, each [b]; every pair comes once.

        Args:
            metrics: `loss` and those of the method.
            inputs: the batch, and `pairs` [b].
        """
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What the units in `inputs` contribute to the mean loss over the pairs of their micro-batch."""
        losses: Losses = inputs.get("losses", self._recorded_losses)
        contributions = []
        for unit in inputs["units"]:
            scores, aux_loss = self._scores(model, unit)
            own = {**inputs, **unit[0], "aux_loss": aux_loss}
            contributions.append(losses(scores, own).sum())
            if aux_loss is not None:
                share = inputs.get("share", len(own["pairs"]))
                contributions.append(self.aux_loss_coef * share * aux_loss)
        loss = torch.stack(contributions).sum() / inputs["size"]
        return (loss, {}) if return_outputs else loss

    def _scores(self, model: nn.Module, unit: Sequence[Batch]) -> tuple[CompletionScores, Tensor | None]:
        """The scores of a unit's completions, and the mean load-balancing loss of its passes, if the model has one."""
        if not self.aux_loss_coef:
            return joined([self.scorer(model, one) for one in unit]), None
        parts, aux_losses = zip(*(self.scorer.with_aux_loss(model, one) for one in unit), strict=True)
        return joined(parts), torch.stack([loss for loss in aux_losses if loss is not None]).mean()

    def _recorded_losses(self, scores: CompletionScores, inputs: Batch) -> Tensor:
        losses, metrics = self.pair_losses(scores, inputs)
        if inputs["aux_loss"] is not None:
            metrics["aux_loss"] = inputs["aux_loss"].expand_as(losses)
        self.record({"loss": losses, **metrics}, inputs)
        return losses

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward, unit by unit; ranks exchange gradients with the last one, where the host wants it."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # schedule-free ones keep two sets of weights
        *jobs, last = self._jobs(model, self._prepare_inputs(inputs))
        state, loss = self.accelerator.gradient_state, torch.zeros((), device=self.args.device)
        synchronised = state.sync_gradients
        for job in jobs:
            with self._apart(model):
                state._set_sync_gradients(False)
                loss += super().training_step(model, job, num_items_in_batch)
            state._set_sync_gradients(synchronised)
        return loss + super().training_step(model, last, num_items_in_batch)

    def _apart(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients on this rank for a while, unless they stay there anyway or the host exchanges each of them."""
        state, deepspeed = self.accelerator.gradient_state, DistributedType.DEEPSPEED
        exchanged = state.plugin_kwargs.get("sync_each_batch") or self.accelerator.distributed_type == deepspeed
        return self.accelerator.no_sync(model) if state.sync_gradients and not exchanged else nullcontext()

    def _jobs(self, model: nn.Module, inputs: Batch) -> list[Batch]:
        """What to run forward and backward one after the other, as much on every rank.

        A pair that is split needs the scores of all its prompts for the loss of each, so it is first run as a whole,
        without gradient.
        """
        jobs = [{**inputs, "units": [unit]} for unit in inputs["units"] if len(unit) == 1]
        split = [unit for unit in inputs["units"] if len(unit) > 1]
        parts = sum(map(len, split))
        idle_parts, idle_jobs = self.pass_counts.missing(parts, len(jobs) + parts)
        with torch.no_grad(), self.compute_loss_context_manager():
            for unit in split:
                whole, aux_loss = self._scores(model, unit)
                own = {**inputs, **unit[0], "aux_loss": aux_loss}
                self._recorded_losses(whole, own)
                losses = self.prompt_losses(whole, own)
                jobs += [{**inputs, "units": [[one]], "losses": losses, "share": 1 / len(unit)} for one in unit]
            self._idle(model, inputs, idle_parts)
        idle = {**inputs, "units": [inputs["units"][-1][-1:]], "losses": _no_losses, "share": 0}
        return jobs + [idle] * idle_jobs

    def _idle(self, model: nn.Module, inputs: Batch, passes: int) -> None:
        """Passes without use, while another rank makes more."""
        for _ in range(passes):
            self.scorer(model, inputs["units"][-1][-1])

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss and metrics of an evaluation batch; there are no predictions to gather."""
        inputs = self._prepare_inputs(inputs)
        (idle,) = self.pass_counts.missing(sum(map(len, inputs["units"])))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            self._idle(model, inputs, idle)
        return loss, None, None

    def floating_point_ops(self, inputs: Batch) -> int:
        """The host's estimate, of all passes."""
        return sum(super(SteppingMixin, self).floating_point_ops(one) for unit in inputs["units"] for one in unit)

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        for unit in inputs["units"]:
            for one in unit:
                super()._track_num_input_tokens({"input_ids": one["input_ids"]})


def _no_losses(scores: CompletionScores, inputs: Batch) -> Tensor:
    """Nothing, with a gradient of zeros."""
    return scores.logps * 0

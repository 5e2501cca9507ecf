"""How a micro-batch is stepped: pass by pass, with the loss and the gradients of a single pass over all its pairs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from axolotl_mopo.engine.ranks import PassCounts
from axolotl_mopo.engine.scoring import CompletionScores, Scorer, joined

Batch = dict[str, Any]


class SteppingMixin(Trainer):
    """Runs the passes that `PairCollator` lays out, in training and in evaluation. A child gives the losses."""

    scorer: Scorer
    pass_counts: PassCounts
    args: Any
    model: Any

    def pair_losses(self, scores: CompletionScores, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The method: scores of the completions of b pairs -> losses [b] and metrics, each [b].

        Args:
            scores: of all completions of the pairs.
            inputs: the batch, and `pairs` [b], the pairs' numbers in it.
        """
        raise NotImplementedError

    def prompt_losses(self, scores: CompletionScores, whole: CompletionScores, inputs: Batch) -> Tensor:
        """What some of a pair's prompts contribute to its loss [1], where its prompts do not fit into one pass.

        Args:
            scores: of the completions of these prompts.
            whole: of all completions of the pair, without gradient.
            inputs: the batch, `pairs` [1], and `prompts`, the first of them and one past the last.
        """
        raise NotImplementedError

    def record(self, metrics: Mapping[str, Tensor]) -> None:
        """Take metrics of b pairs, each [b]; every pair comes once."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What the units in `inputs` contribute to the mean loss over the pairs of their micro-batch."""
        losses = [self._unit_loss(model, unit, inputs) for unit in inputs["units"]]
        loss = torch.stack(losses).sum() / inputs["size"]
        return (loss, {}) if return_outputs else loss

    def _unit_loss(self, model: nn.Module, unit: list[Batch], inputs: Batch) -> Tensor:
        scores = joined([self.scorer(model, one) for one in unit])
        inputs = {**inputs, **unit[0]}
        if inputs.get("filler"):
            return scores.logps.sum() * 0
        if whole := inputs.get("whole"):
            return self.prompt_losses(scores, CompletionScores(*whole), inputs).sum()
        return self._recorded_losses(scores, inputs).sum()

    def _recorded_losses(self, scores: CompletionScores, inputs: Batch) -> Tensor:
        losses, metrics = self.pair_losses(scores, inputs)
        self.record({"loss": losses, **metrics})
        return losses

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward, unit by unit; ranks exchange gradients with the last one, where the host wants it."""
        model.train()
        jobs = self._jobs(model, self._prepare_inputs(inputs))
        gradient_state = self.accelerator.gradient_state
        synchronised, loss = gradient_state.sync_gradients, torch.zeros((), device=self.args.device)
        for job in jobs[:-1]:
            gradient_state._set_sync_gradients(False)
            with self.accelerator.no_sync(model):
                loss += super().training_step(model, job, num_items_in_batch)
        gradient_state._set_sync_gradients(synchronised)
        return loss + super().training_step(model, jobs[-1], num_items_in_batch)

    def _jobs(self, model: nn.Module, inputs: Batch) -> list[Batch]:
        """What to run forward and backward one after the other, as much on every rank.

        A pair that is split needs the scores of all its prompts for the loss of each, so it is first run as a whole,
        without gradient.
        """
        jobs = [{**inputs, "units": [unit]} for unit in inputs["units"] if len(unit) == 1]
        split = [unit for unit in inputs["units"] if len(unit) > 1]
        with torch.no_grad(), self.compute_loss_context_manager():
            for unit in split:
                scores = joined([self.scorer(model, one) for one in unit])
                self._recorded_losses(scores, {**inputs, **unit[0]})
                # A plain tuple, since the host rebuilds what it moves to the device.
                jobs += [{**inputs, "units": [[one]], "whole": tuple(scores)} for one in unit]
            self._fill_up(model, inputs, sum(map(len, split)))
        filler = {**inputs, "units": [inputs["units"][-1][-1:]], "filler": True}
        return jobs + [filler] * self.pass_counts.fillers(len(jobs))

    def _fill_up(self, model: nn.Module, inputs: Batch, passes: int) -> None:
        """Passes without use, where another rank makes more than these."""
        for _ in range(self.pass_counts.fillers(passes)):
            self.scorer(model, inputs["units"][-1][-1])

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss and metrics of an evaluation batch; there are no predictions to gather."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            self._fill_up(model, inputs, sum(map(len, inputs["units"])))
        return loss, None, None

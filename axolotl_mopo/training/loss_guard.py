"""Handles losses that are not finite: stops the run, or skips the step.

Without `on_bad_loss: skip` the losses are read only after a step that logs, saves or evaluates, so that no other step
waits for the device.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from axolotl_mopo.errors import LossError
from axolotl_mopo.training.metrics import MetricWindow

LOG = get_logger("axolotl.mopo")

_NAMED_ROWS = 3
_SHOWN_TOKENS = 12


class LossGuard(TrainerCallback):
    """Stops a run after a bad loss before anything of that step is logged or saved, or skips such steps.

    Args:
        accelerator: accelerator of the run.
        window: metrics of the steps; those of a skipped step are removed.
        describe_rows: describes the rows of the training set with these numbers, for messages.
        skip: whether to skip a bad step, so that no parameter and no state of the optimizer changes.
    """

    def __init__(
        self, accelerator: Accelerator, window: MetricWindow, describe_rows: Callable[[list[int]], str], skip: bool
    ) -> None:
        self.accelerator, self.window, self.describe_rows, self.skip = accelerator, window, describe_rows, skip
        self.skipped = 0
        """Number of skipped steps so far."""
        self._losses: list[tuple[int, Tensor, Tensor]] = []

    def note(self, step: int, rows: Tensor, losses: Tensor) -> None:
        """Record, on the device, which of the losses [b] of rows [b] of the training set are not finite."""
        self._losses.append((step, rows, ~losses.detach().isfinite()))

    def finite(self, loss: Tensor) -> Tensor:
        """Return the loss for transformers' average; with `skip`, 0 for a loss that is not finite."""
        return loss.nan_to_num(0, 0, 0) if self.skip else loss

    def report(self, logs: dict[str, float], steps: bool) -> None:
        """Add the number of skipped steps to the log entry, and remove values that belong to skipped steps only.

        Args:
            logs: log entry of transformers, changed in place.
            steps: whether any step of the logging window was not skipped.
        """
        if not self.skip:
            return
        logs["skipped_steps"] = self.skipped
        if not steps:
            del logs["loss"]
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the metrics window, to remove the metrics of this step if it is skipped."""
        self.window.mark()

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Remove the gradients of a bad step, so that the optimizer changes nothing."""
        if not self.skip:
            return
        message = self._message()
        if message is None and not _gradient_is_finite(model):
            message = f"The gradient of step {state.global_step + 1} is not finite, though the loss is"
        if message:
            optimizer.zero_grad(set_to_none=True)
            self.window.rewind()
            self.skipped += 1
            LOG.warning("%s. The step is skipped (%d skipped so far).", message, self.skipped)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check the losses before transformers logs, saves or evaluates."""
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._stop()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check the losses, since transformers may log, save, evaluate or end next."""
        self._stop()

    def _stop(self) -> None:
        if not self.skip and (message := self._message()):
            raise LossError(
                f"{message}. Nothing was saved after this step. Check these rows and the learning rate; to skip such "
                "steps, set `on_bad_loss: skip` in the method's block"
            )

    def _message(self) -> str | None:
        found = self.first_bad_step()
        if found is None:
            return None
        step, rows = found
        described = self.describe_rows(rows[:_NAMED_ROWS])
        rest = f"; and {len(rows) - _NAMED_ROWS} more" if len(rows) > _NAMED_ROWS else ""
        return f"The loss of step {step} is not finite, for row {described}{rest} of the prepared training set"

    def first_bad_step(self) -> tuple[int, list[int]] | None:
        """Return the first step since the last call with a bad loss, and the rows with bad losses on all ranks.

        Every rank must call this. If there is no bad loss, the device is read once.
        """
        losses, self._losses = self._losses, []
        if not losses:
            return None
        bad = torch.stack([bad.any() for _, _, bad in losses]).any()
        if not self.accelerator.reduce(bad.float(), reduction="sum").item():
            return None
        found = gather_object([(step, row) for step, rows, bad in losses for row in rows[bad].tolist()])
        first = min(step for step, _ in found)
        return first, sorted({row for step, row in found if step == first})


def describe_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, numbers: list[int]) -> str:
    """Describe rows by their numbers and the beginnings of their two completions."""

    def beginning(row: dict[str, Any], side: str) -> str:
        return repr(tokenizer.decode(row[f"{side}_input_ids"][:_SHOWN_TOKENS]))

    rows = ((number, dataset[number]) for number in numbers)
    return "; ".join(
        f"{number} (chosen {beginning(row, 'chosen')}, rejected {beginning(row, 'rejected')})" for number, row in rows
    )


def _gradient_is_finite(model: nn.Module) -> bool:
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())

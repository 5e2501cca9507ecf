"""What happens if a loss is not finite. A run that stops there reads nothing from the device within a step."""

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
    """Stops a run after a bad loss, before anything of it is logged or saved; or skips such steps.

    Args:
        accelerator: of the run.
        window: the metrics of the steps, which forgets a step that is skipped.
        describe_rows: the rows of the training set with these numbers, for messages.
        skip: whether a bad step is skipped: no parameter and no state of the optimizer changes.
    """

    def __init__(
        self, accelerator: Accelerator, window: MetricWindow, describe_rows: Callable[[list[int]], str], skip: bool
    ) -> None:
        self.accelerator, self.window, self.describe_rows, self.skip = accelerator, window, describe_rows, skip
        self.skipped = 0
        """Steps so far."""
        self._losses: list[tuple[int, Tensor, Tensor]] = []

    def note(self, step: int, rows: Tensor, losses: Tensor) -> None:
        """Note, on the device, which of the losses [b] of rows [b] of the training set are bad."""
        self._losses.append((step, rows, ~losses.detach().isfinite()))

    def finite(self, loss: Tensor) -> Tensor:
        """The loss that transformers averages; 0 for a bad one whose step is skipped."""
        return loss.nan_to_num(0, 0, 0) if self.skip else loss

    def report(self, logs: dict[str, float], steps: bool) -> None:
        """Add the number of skipped steps to what is logged, and take away what no step that was made stands for.

        Args:
            logs: transformers' own numbers, changed in place.
            steps: whether any step of the logging window was made.
        """
        if not self.skip:
            return
        logs["skipped_steps"] = self.skipped
        if not steps:
            del logs["loss"]
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What is measured from here on is forgotten if the step is skipped."""
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
        """Gradients are complete: remove those of a bad step, so that the optimizer makes no step."""
        if not self.skip:
            return
        message = self._message()
        if message is None and not _gradient_is_finite(model):
            message = f"The gradient of step {state.global_step + 1} is not finite, though the loss is"
        if message:
            optimizer.zero_grad(set_to_none=True)
            self.window.rewind()
            self.skipped += 1
            LOG.warning("%s. The step is skipped; %d were so far.", message, self.skipped)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look back before transformers reads or keeps something."""
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._stop()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """transformers may log, save and evaluate next, or end."""
        self._stop()

    def _stop(self) -> None:
        if not self.skip and (message := self._message()):
            raise LossError(
                f"{message}. Nothing was saved since. Look at these rows and at the learning rate; to go on without "
                "such steps, set `on_bad_loss: skip` in the method's block"
            )

    def _message(self) -> str | None:
        found = self.first_bad_step()
        if found is None:
            return None
        step, rows = found
        named = self.describe_rows(rows[:_NAMED_ROWS])
        rest = f"; and {len(rows) - _NAMED_ROWS} more" if len(rows) > _NAMED_ROWS else ""
        return f"The loss of step {step} is not finite, for row {named}{rest} of the prepared training set"

    def first_bad_step(self) -> tuple[int, list[int]] | None:
        """The first step since the last call that had bad losses, and their rows on all ranks; every rank must ask.

        The device is read once if there is none.
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
    """Rows' numbers and the beginnings of their two completions."""

    def beginning(row: dict[str, Any], side: str) -> str:
        return repr(tokenizer.decode(row[f"{side}_input_ids"][:_SHOWN_TOKENS]))

    rows = ((number, dataset[number]) for number in numbers)
    return "; ".join(
        f"{number} (chosen {beginning(row, 'chosen')}, rejected {beginning(row, 'rejected')})" for number, row in rows
    )


def _gradient_is_finite(model: nn.Module) -> bool:
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())

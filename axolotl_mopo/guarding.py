"""What happens when a loss is no finite number; a run that is to stop there looks at none within a step."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from axolotl.utils.logging import get_logger
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

LOG = get_logger("axolotl.mopo")

_NAMED_ROWS = 3
_SHOWN_TOKENS = 12


class LossError(RuntimeError):
    """A loss that is no finite number; the text names step and rows."""


class LossGuard:
    """Notes, on the device, which pairs had a bad loss since it was asked last."""

    def __init__(self) -> None:
        self._notes: list[tuple[int, Tensor, Tensor]] = []

    def note(self, step: int, rows: Tensor, losses: Tensor) -> None:
        """Note the losses [b] of rows [b] of the training set."""
        self._notes.append((step, rows, ~losses.detach().isfinite()))

    def pop(self, accelerator: Accelerator) -> tuple[int, list[int]] | None:
        """The first step that had bad losses, and their rows on all ranks, or None; every rank must ask.

        The device is read once where there is none.
        """
        notes, self._notes = self._notes, []
        if not notes:
            return None
        bad = torch.stack([bad.any() for _, _, bad in notes]).any()
        if not accelerator.reduce(bad.float(), reduction="sum").item():
            return None
        found = [(step, row) for step, rows, bad in notes for row in rows[bad].tolist()]
        found = gather_object(found)
        first = min(step for step, _ in found)
        return first, sorted({row for step, row in found if step == first})


class GuardCallback(TrainerCallback):
    """Stops a run after a bad loss, before anything of it is logged or saved; or skips such steps.

    Args:
        trainer: with a `loss_guard`, and a window of metrics to rewind.
        skip: whether a bad step is skipped: no parameter and no state of the optimizer changes.
    """

    def __init__(self, trainer: Any, skip: bool) -> None:
        self.trainer, self.skip, self.skipped = trainer, skip, 0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What is measured from here on is rewound where the step is skipped."""
        self.trainer.train_window.mark()

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Gradients are complete: take those of a bad step away, and the optimizer makes no step."""
        if not self.skip:
            return
        message = self._message()
        if message is None and not _gradient_is_finite(model):
            message = f"The gradient of step {state.global_step + 1} is not finite, though the loss is"
        if message:
            optimizer.zero_grad(set_to_none=True)
            self.trainer.train_window.rewind()
            self.skipped += 1
            LOG.warning("%s. The step is skipped; %d were so far.", message, self.skipped)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look back where the host is about to read or keep something."""
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._stop()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The host may log, save and evaluate next, or end."""
        self._stop()

    def _stop(self) -> None:
        if not self.skip and (message := self._message()):
            raise LossError(
                f"{message}. Nothing was saved since. Look at these rows and at the learning rate; to go on without "
                "such steps, set `on_bad_loss: skip` in the method's block"
            )

    def _message(self) -> str | None:
        found = self.trainer.loss_guard.pop(self.trainer.accelerator)
        if found is None:
            return None
        step, rows = found
        named = "; ".join(
            _shown(self.trainer.train_dataset, row, self.trainer.processing_class) for row in rows[:_NAMED_ROWS]
        )
        rest = f"; and {len(rows) - _NAMED_ROWS} more" if len(rows) > _NAMED_ROWS else ""
        return f"The loss of step {step} is not finite, for row {named}{rest} of the prepared training set"


def _gradient_is_finite(model: nn.Module) -> bool:
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())


def _shown(rows: Dataset, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row's number and the beginnings of its two completions."""
    row = rows[number]
    chosen, rejected = (tokenizer.decode(row[f"{side}_input_ids"][:_SHOWN_TOKENS]) for side in ("chosen", "rejected"))
    return f"{number} (chosen {chosen!r}, rejected {rejected!r})"

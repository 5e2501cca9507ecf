"""Base class of the trainers: layout, evaluation, metrics and the model card.

Axolotl imports the trainers only after it has set up TRL and its training arguments, so no other module imports them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import trl.trainer.utils
from accelerate.utils import broadcast_object_list
from axolotl.core.trainers.mixins import ActivationOffloadingMixin, DistributedParallelMixin, RngLoaderMixin
from axolotl.core.trainers.mixins.optimizer import OptimizerInitMixin, OptimizerMixin
from axolotl.core.trainers.mixins.scheduler import SchedulerMixin
from axolotl.utils.logging import get_logger
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from axolotl_mopo.config import MethodConfig
from axolotl_mopo.errors import ConfigError, DataError, NoiseError
from axolotl_mopo.logprobs.attention import use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.logprobs.layout import (
    Layout,
    gives_aux_loss,
    plan_layout,
    require_layout,
    tolerance_of,
    try_layout,
    turn_off_noise,
)
from axolotl_mopo.logprobs.log_softmax import selective_log_softmax
from axolotl_mopo.logprobs.passes import PassCounts
from axolotl_mopo.training.collator import PairCollator, read_tokens
from axolotl_mopo.training.loss_guard import LossGuard, describe_rows
from axolotl_mopo.training.metrics import MetricWindow
from axolotl_mopo.training.microbatching import Collated, MicrobatchMixin, Part
from axolotl_mopo.training.prepared_rows import with_lengths, with_numbers
from axolotl_mopo.training.warnings import budget_message, row_warnings

LOG = get_logger("axolotl.mopo")

_CHECKED_ROWS = 4
_AUX_LOSS_COEF = 0.001
"""TRL's default for preference tuning."""
_DEVIATIONS = {"weights/": "weights_std/", "margins/": "margins_std/", "rewards/margins": "rewards/margins_std"}
"""Prefix of metrics whose standard deviation is logged as well -> prefix of its name."""


class MultiObjectiveTrainer(
    RngLoaderMixin,
    SchedulerMixin,
    OptimizerMixin,
    OptimizerInitMixin,
    ActivationOffloadingMixin,
    DistributedParallelMixin,
    MicrobatchMixin,
):
    """Base class of MODPO's and AMoPO's trainer. A subclass defines `block`, `tag_names`, `citation` and the losses."""

    block: ClassVar[type[MethodConfig]]
    tag_names: ClassVar[list[str]]
    citation: ClassVar[str]

    model: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any

    method: Any
    """The settings, a `block`."""
    _layout: Layout

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        args: Any,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        if len(train_dataset) == 0:
            raise DataError(
                "no rows are left in the training set; the log reports how many were longer than sequence_len. Raise "
                "`sequence_len`, or set `excess_length_strategy: truncate`"
            )
        for message in row_warnings(train_dataset, eval_dataset):
            LOG.warning(message)
        turn_off_noise(model)
        self.method = self.block.model_validate(args.mopo)
        collator = PairCollator(processing_class.pad_token_id or 0, max_tokens=self.method.max_tokens_per_pass)
        super().__init__(
            model=model,
            args=args,
            train_dataset=with_lengths(train_dataset),
            eval_dataset=None if eval_dataset is None else with_lengths(eval_dataset),
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )
        # The loss is a mean over pairs, so transformers must divide it by the number of accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.train_dataset = numbered(self.train_dataset, 0)
        if self.eval_dataset is not None:
            self.eval_dataset = numbered(self.eval_dataset, len(self.train_dataset))
        self.train_window, self._eval_window = MetricWindow(), MetricWindow()
        described = partial(describe_rows, self.train_dataset, processing_class)
        skip = self.method.on_bad_loss == "skip"
        self.loss_guard = LossGuard(self.accelerator, self.train_window, described, skip)
        self.add_callback(self.loss_guard)
        self.pass_counts = PassCounts(differ=collator.max_tokens is not None)

        self._base.add_model_tags(self.tag_names)
        self.aux_loss_coef = self._choose_aux_loss_coef()
        self._layout_tried = False
        self._use_layout(plan_layout(self._base, self.method.layout, bool(args.torch_compile)))
        if not self.is_sharded:
            # In the precision of training, and before torch compiles the model.
            with self.accelerator.autocast():
                self.try_layout(model)
        self.add_callback(_BeforeFirstStep(self))

    @property
    def _base(self) -> Any:
        """The transformers model inside the policy, without PEFT's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def is_sharded(self) -> bool:
        """Whether only the prepared model can be run, since weights are sharded or not yet in their dtype."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def before_first_step(self, wrapped: nn.Module, resumed: bool) -> None:
        """Do what needs the prepared model: try the layout if that was not possible before.

        Args:
            wrapped: the prepared model, with the weights that training starts from.
            resumed: whether these come from a checkpoint.
        """
        if not self._layout_tried:
            self.try_layout(wrapped)

    def try_layout(self, wrapped: nn.Module) -> None:
        """Try the planned layout on a few rows, and turn off the parts that change the log-probs.

        Raises:
            ConfigError: if packed trees are requested and change the log-probs, or the model adds noise in training.
        """
        pairs, device = [read_tokens(row) for row in self.checked_rows], self.args.device
        layout = noise = None
        try:
            layout = try_layout(self._layout, wrapped, self._base, pairs, device, self.tolerance)
        except NoiseError as error:
            noise = f"{error}; turn it off with `overrides_of_model_config`"
        layout, noise = broadcast_object_list([layout, noise])  # all ranks use the result of the first one
        if layout is None:
            raise ConfigError(noise)
        self._use_layout(layout)
        if self.aux_loss_coef and not gives_aux_loss(wrapped, pairs[0], device, layout.packed):
            self.aux_loss_coef = self._without_aux_loss()
        self._layout_tried = True
        self._announce_layout()

    @property
    def checked_rows(self) -> Dataset:
        """The first rows of the training set, on which the model is checked before the first step."""
        return self.train_dataset.select(range(min(_CHECKED_ROWS, len(self.train_dataset))))

    @property
    def tolerance(self) -> float:
        """Largest difference between two correct computations of the policy's log-probs, in nats per token."""
        return tolerance_of(next(self.model.parameters()), self.accelerator.mixed_precision != "no")

    def _use_layout(self, layout: Layout) -> None:
        try:
            require_layout(layout, self._base, self.method.layout)
        except ValueError as error:
            raise ConfigError(f"`layout: packed`: {error}; remove the key, or set it to padded") from None
        if layout.packed:
            use_tree_attention(self._base)
        self._layout = layout
        self.data_collator.packed = layout.packed
        budget = self.method.logits_budget * 2**30
        self.logprob_computer = LogProbComputer(
            self._base if layout.fused_head else None, budget, choose_log_softmax(self.args.device)
        )

    def _choose_aux_loss_coef(self) -> float:
        """Return the coefficient of the load-balancing loss; 0 for a model without this loss.

        Raises:
            ConfigError: if the YAML sets it for a model without this loss, or the loss would have no gradient.
        """
        config, asked = self._base.config.get_text_config(), signature(self._base.forward).parameters
        if "output_router_logits" not in asked or getattr(config, "output_router_logits", None) is None:
            return self._without_aux_loss()
        coef = self.method.router_aux_loss_coef
        coef = _AUX_LOSS_COEF if coef is None else coef
        if (
            coef
            and self.args.gradient_checkpointing
            and (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        ):
            raise ConfigError(
                "with `gradient_checkpointing_kwargs.use_reentrant: true` the load-balancing loss of a mixture of "
                f"experts has no gradient; set it to false, or set `{self.method.rl}.router_aux_loss_coef: 0`"
            )
        return coef

    def _without_aux_loss(self) -> float:
        if self.method.router_aux_loss_coef:
            raise ConfigError(
                f"`router_aux_loss_coef` has no effect on a {type(self._base).__name__}, which has no load-balancing "
                "loss; remove it"
            )
        return 0.0

    def _announce_layout(self) -> None:
        name, layout = type(self._base).__name__, self._layout
        if layout.packed:
            LOG.info("%s is trained in packed prefix trees.", name)
        elif self.method.layout == "padded":
            LOG.info("%s is trained in padded rows.", name)
        else:
            LOG.warning("%s is trained in padded rows, not in packed trees: %s.", name, layout.why_not_packed)
        if reason := layout.why_not_fused_head:
            LOG.info("All logits of %s are computed at once and `logits_budget` has no effect: %s.", name, reason)
        if self.is_world_process_zero() and (message := budget_message(self.train_dataset, self.data_collator)):
            LOG.info(message)

    def training_step(
        self, model: nn.Module, inputs: Collated, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the shared step; the loss of a skipped step counts as 0 in transformers' mean."""
        return self.loss_guard.finite(super().training_step(model, inputs, num_items_in_batch))

    def record(self, metrics: Mapping[str, Tensor], part: Part) -> None:
        """Add metrics of some pairs to the training or the evaluation window."""
        if self.model.training:
            self.train_window.add(metrics)
            assert part.rows is not None  # noqa: S101 (the training set is numbered)
            self.loss_guard.note(self.state.global_step + 1, part.rows, metrics["loss"])
        else:
            self._eval_window.add(self._without_repeats(metrics, part))

    def _without_repeats(self, metrics: Mapping[str, Tensor], part: Part) -> Mapping[str, Tensor]:
        """Remove the pairs that accelerate repeats to fill the last evaluation batches of all ranks."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return metrics
        own = part.pairs < state.remainder - self.args.process_index * part.size
        return {name: values[own] for name, values in metrics.items()}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, within a training run or on its own.

        Raises:
            ConfigError: if FSDP or DeepSpeed shards the model and has not prepared it.
        """
        self.require_prepared()
        return super().evaluate(*args, **kwargs)

    def require_prepared(self) -> None:
        """Refuse to evaluate a model that FSDP or DeepSpeed shards and has not prepared.

        Raises:
            ConfigError: if the model is not prepared.
        """
        if not self._layout_tried:
            raise ConfigError(
                "a model that FSDP or DeepSpeed shards can be evaluated only within a training run; for `axolotl "
                "evaluate` remove `fsdp`, `fsdp_config` and `deepspeed` from the YAML"
            )

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Run transformers' loop; add the method's metrics and replace the loss by the mean over pairs."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = {f"{prefix}_{name}": value for name, value in self._pop_metrics(self._eval_window).items()}
        return output._replace(metrics={**(output.metrics or {}), **means})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; add the means of the logging window if the entry has the training loss."""
        if "loss" in logs:
            metrics = self._pop_metrics(self.train_window)
            self.loss_guard.report(logs, steps=bool(metrics))
            logs |= metrics
        super().log(logs, start_time)

    def _pop_metrics(self, window: MetricWindow) -> dict[str, float]:
        statistics = window.pop(self.accelerator)
        deviations = {
            _DEVIATIONS[head] + name.removeprefix(head): statistic.std
            for name, statistic in statistics.items()
            for head in _DEVIATIONS
            if name.startswith(head) and not name.endswith(("/chosen", "/rejected"))
        }
        return {name: statistic.mean for name, statistic in statistics.items()} | deviations

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Create transformers' model card, with the method's tags and citation."""
        super().create_model_card(*args, **{**kwargs, "tags": list(self.tag_names)})
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / "README.md"
            card = ModelCard.load(path)
            card.text += f"\n\n### Citation\n\n```bibtex\n{self.citation}\n```\n"
            card.save(path)


class _BeforeFirstStep(TrainerCallback):
    """Calls `before_first_step` of the trainer."""

    def __init__(self, trainer: MultiObjectiveTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called once the model is prepared and a checkpoint, if any, is loaded."""
        self.trainer.before_first_step(self.trainer.model_wrapped, resumed=state.global_step > 0)


def choose_log_softmax(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the fastest implementation: on a GPU Axolotl's kernel, which it puts into TRL when it loads a model."""
    return trl.trainer.utils.selective_log_softmax if device.type == "cuda" else selective_log_softmax


def numbered(rows: Dataset, first: int) -> Dataset:
    """Add the column `pair_index`, which numbers the rows from `first` on."""
    if "pair_index" in rows.column_names:  # added by another trainer on the same rows
        rows = rows.remove_columns("pair_index")
    return with_numbers(rows, "pair_index", np.arange(first, first + len(rows)))


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Return the metrics of the rewards of chosen and rejected responses, [b] each."""
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
    }

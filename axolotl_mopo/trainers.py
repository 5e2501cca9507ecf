"""The trainers: what the two methods share, and the few lines in which they differ.

Imported by the host only after it has prepared TRL and its own training arguments, so nothing else imports this module.
"""

import math
import random
from collections.abc import Callable, Mapping
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
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from axolotl_mopo.config import AMoPOConfig, ConfigError, DimensionsBlock, MODPOConfig
from axolotl_mopo.data.collating import PairCollator, read_tokens
from axolotl_mopo.data.columns import with_numbers
from axolotl_mopo.data.lengths import budget_message, with_lengths
from axolotl_mopo.data.notes import notes
from axolotl_mopo.data.rows import DataError
from axolotl_mopo.engine.attention import use_tree_attention
from axolotl_mopo.engine.layout import (
    Layout,
    NoiseError,
    gives_aux_loss,
    plan_layout,
    require_layout,
    tolerance_of,
    try_layout,
)
from axolotl_mopo.engine.log_softmax import selective_log_softmax
from axolotl_mopo.engine.noise import turn_off_noise
from axolotl_mopo.engine.ranks import PassCounts
from axolotl_mopo.engine.scoring import CompletionScores, Scorer, by_side
from axolotl_mopo.guarding import GuardCallback, LossGuard
from axolotl_mopo.losses import adaptive_weights, amopo_loss, modpo_loss
from axolotl_mopo.margins.cache import TableCache
from axolotl_mopo.margins.implicit import PairScorer
from axolotl_mopo.margins.precompute import Constants, Precomputation
from axolotl_mopo.margins.start import FILE_NAME as START_FILE
from axolotl_mopo.margins.start import StartCallback, read_start
from axolotl_mopo.metrics import MetricWindow
from axolotl_mopo.stepping import Batch, Losses, SteppingMixin

LOG = get_logger("axolotl.mopo")

_CHECKED_ROWS = 4
_AUX_LOSS_COEF = 0.001
"""TRL's default for preference tuning."""
_SPREADS = {"weights/": "weights_std/", "margins/": "margins_std/", "rewards/margins": "rewards/margins_std"}
"""Metrics whose standard deviation is logged as well, and under which name."""


class MultiObjectiveTrainer(
    RngLoaderMixin,
    SchedulerMixin,
    OptimizerMixin,
    OptimizerInitMixin,
    ActivationOffloadingMixin,
    DistributedParallelMixin,
    SteppingMixin,
):
    """What MODPO and AMoPO share: layout, metrics and the model card. A child gives its block and the losses."""

    block: ClassVar[type[MODPOConfig] | type[DimensionsBlock]]
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
                "the training set has no rows left; look in the log for how many were longer than sequence_len, and "
                "raise it, or set excess_length_strategy: truncate"
            )
        for note in notes(train_dataset, eval_dataset):
            LOG.warning(note)
        turn_off_noise(model)
        self.method = self.block.model_validate(args.mopo)
        collator = PairCollator(processing_class.pad_token_id or 0, max_tokens=self.method.max_tokens_per_step)
        super().__init__(
            model=model,
            args=args,
            train_dataset=with_lengths(train_dataset),
            eval_dataset=None if eval_dataset is None else with_lengths(eval_dataset),
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )
        # The loss is a mean over pairs; the host divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.train_dataset = _numbered(self.train_dataset, 0)
        if self.eval_dataset is not None:
            self.eval_dataset = _numbered(self.eval_dataset, len(self.train_dataset))
        self.train_window, self._eval_window = MetricWindow(), MetricWindow()
        self.loss_guard = LossGuard()
        self._guarding = GuardCallback(self, skip=self.method.on_bad_loss == "skip")
        self.add_callback(self._guarding)
        self.pass_counts = PassCounts(differ=collator.max_tokens is not None)

        self._base.add_model_tags(self.tag_names)
        self.aux_loss_coef = self._choose_aux_loss_coef()
        self._layout_tried = False
        self._use_layout(plan_layout(self._base, self.method.layout, bool(args.torch_compile)))
        if not self._is_sharded:
            # As the model will be run, before torch compiles it.
            with self.accelerator.autocast():
                self.try_layout(model)
        self.add_callback(_BeforeFirstStep(self))

    @property
    def _base(self) -> Any:
        """The transformers model inside the policy's adapters."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def _is_sharded(self) -> bool:
        """Whether the model can be run only once it is prepared: its weights are split, or not yet in their dtype."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def before_first_step(self, wrapped: nn.Module, resumed: bool) -> None:
        """Do what needs the prepared model: try the layout, where that was not possible before.

        Args:
            wrapped: the prepared model, whose weights are those that training starts from.
            resumed: whether they are a checkpoint's.
        """
        if not self._layout_tried:
            self.try_layout(wrapped)

    def try_layout(self, wrapped: nn.Module) -> None:
        """Try the planned layout on a few rows, and drop what changes the log-probs.

        Raises:
            ConfigError: where packed trees are asked for and change the log-probs, or the model adds noise in training.
        """
        pairs, device = [read_tokens(row) for row in self._checked_rows], self.args.device
        layout = noise = None
        try:
            layout = try_layout(self._layout, wrapped, self._base, pairs, device, self._tolerance)
        except NoiseError as error:
            noise = f"{error}; turn it off with `overrides_of_model_config`"
        layout, noise = broadcast_object_list([layout, noise])  # all ranks follow the first one
        if layout is None:
            raise ConfigError(noise)
        self._use_layout(layout)
        if self.aux_loss_coef and not gives_aux_loss(wrapped, pairs[0], device, layout.packed):
            self.aux_loss_coef = self._without_aux_loss()
        self._layout_tried = True
        self._announce_layout()

    @property
    def _checked_rows(self) -> Dataset:
        return self.train_dataset.select(range(min(_CHECKED_ROWS, len(self.train_dataset))))

    @property
    def _tolerance(self) -> float:
        """Nats a token by which two computations of the policy may differ."""
        return tolerance_of(next(self.model.parameters()), self.accelerator.mixed_precision != "no")

    def _use_layout(self, layout: Layout) -> None:
        try:
            require_layout(layout, self._base, self.method.layout)
        except ValueError as error:
            raise ConfigError(f"`layout: packed`: {error}; drop the key, or set it to padded") from None
        if layout.packed:
            use_tree_attention(self._base)
        self._layout = layout
        self.data_collator.packed = layout.packed
        budget = self.method.logits_budget * 2**30
        self.scorer = Scorer(self._base if layout.inside else None, budget, choose_log_softmax(self.args.device))

    def _choose_aux_loss_coef(self) -> float:
        """The coefficient of the load-balancing loss; 0 for a model that has none.

        Raises:
            ConfigError: where the YAML gives one to a model that has none, or the loss would have no gradient.
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
                "`gradient_checkpointing_kwargs.use_reentrant: true` leaves the load-balancing loss of a mixture of "
                f"experts without a gradient; set it to false, or `{self.method.rl}.router_aux_loss_coef: 0`"
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
        if reason := layout.why_not_inside:
            LOG.info("The logits of %s are computed at once, `logits_budget` has no effect: %s.", name, reason)
        if self.is_world_process_zero() and (message := budget_message(self.train_dataset, self.data_collator)):
            LOG.info(message)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The shared step; the host's mean of the losses counts one that makes a step be skipped as 0."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        return loss.nan_to_num(0, 0, 0) if self._guarding.skip else loss

    def record(self, metrics: Mapping[str, Tensor], inputs: Batch) -> None:
        """Add metrics of some pairs to the window of the mode that the model is in."""
        if self.model.training:
            self.train_window.add(metrics)
            rows = inputs["pair_index"][inputs["pairs"]]
            self.loss_guard.note(self.state.global_step + 1, rows, metrics["loss"])
        else:
            self._eval_window.add(self._without_repeats(metrics, inputs))

    def _without_repeats(self, metrics: Mapping[str, Tensor], inputs: Batch) -> Mapping[str, Tensor]:
        """Metrics without pairs that accelerate repeats, so that the last evaluation batches of all ranks are full."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return metrics
        own = inputs["pairs"] < state.remainder - self.args.process_index * inputs["size"]
        return {name: values[own] for name, values in metrics.items()}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, within a training run or by itself.

        Raises:
            ConfigError: where weights are split and the model has not been prepared for training.
        """
        self._require_prepared()
        return super().evaluate(*args, **kwargs)

    def _require_prepared(self) -> None:
        if not self._layout_tried:
            raise ConfigError(
                "a model that FSDP or DeepSpeed splits can be evaluated within a training run only; for `axolotl "
                "evaluate` remove `fsdp`, `fsdp_config` and `deepspeed` from the YAML"
            )

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The host's loop, with our metrics among its own and a loss that is the mean over pairs."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = {f"{prefix}_{name}": value for name, value in self._pop_metrics(self._eval_window).items()}
        return output._replace(metrics={**(output.metrics or {}), **means})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the logging window where the host logs the training loss."""
        if "loss" in logs:
            metrics = self._pop_metrics(self.train_window)
            if self._guarding.skip:
                logs["skipped_steps"] = self._guarding.skipped
                if not metrics:  # no step of the window was made
                    del logs["loss"]
                if not math.isfinite(logs.get("grad_norm", 0.0)):
                    del logs["grad_norm"]
            logs |= metrics
        super().log(logs, start_time)

    def _pop_metrics(self, window: MetricWindow) -> dict[str, float]:
        statistics = window.pop(self.accelerator)
        spreads = {
            _SPREADS[head] + name.removeprefix(head): statistic.std
            for name, statistic in statistics.items()
            for head in _SPREADS
            if name.startswith(head) and not name.endswith(("/chosen", "/rejected"))
        }
        return {name: statistic.mean for name, statistic in statistics.items()} | spreads

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The host's card, with the method's tags and citation."""
        super().create_model_card(*args, **{**kwargs, "tags": list(self.tag_names)})
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir)) / "README.md"
            card = ModelCard.load(path)
            card.text += f"\n\n### Citation\n\n```bibtex\n{self.citation}\n```\n"
            card.save(path)


class AMoPOTrainer(MultiObjectiveTrainer):
    """`rl: amopo` (arXiv 2506.07165): a prompt for every dimension, no reward model and no reference model."""

    block: ClassVar = AMoPOConfig
    method: AMoPOConfig
    tag_names: ClassVar = ["axolotl", "amopo"]
    citation: ClassVar = """@inproceedings{liu2025amopo,
  title     = {{AMoPO}: Adaptive Multi-objective Preference Optimization without Reward Models and Reference Models},
  author    = {Liu, Qi and Ruan, Jingqing and Li, Hao and Zhao, Haodong and Wang, Desheng and Chen, Jiansong and
               Guanglu, Wan and Cai, Xunliang and Zheng, Zhi and Xu, Tong},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2025},
  year      = {2025},
  note      = {arXiv:2506.07165}
}"""

    def __init__(self, model: PreTrainedModel | PeftModel, *, args: Any, **kwargs: Any) -> None:
        super().__init__(model, args=args, **kwargs)
        self._micro_batch = (0, 0)
        weighting, names = self.method.weighting, self.method.prompt_names
        self._fixed_weights = None
        if isinstance(weighting, dict):
            self._fixed_weights = torch.tensor([weighting[name] for name in names], device=args.device)
        elif weighting == "uniform":
            self._fixed_weights = torch.full((len(names),), 1 / len(names), device=args.device)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The shared step, counted within its optimizer step."""
        step, number = self._micro_batch
        self._micro_batch = (self.state.global_step, number + 1 if step == self.state.global_step else 1)
        return super().training_step(model, inputs, num_items_in_batch)

    def pair_losses(self, scores: CompletionScores, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `losses.amopo_loss`.

        A dimension's reward is beta * logp / length; rewards that name no dimension are the sum weighted by alpha.
        """
        method, names = self.method, self.method.prompt_names
        chosen, rejected = by_side(scores, len(names))
        weights = self._weights(chosen, rejected, inputs)
        chosen_rewards = method.beta * chosen.logps.detach() / chosen.lengths
        rejected_rewards = method.beta * rejected.logps.detach() / rejected.lengths
        margins = chosen_rewards - rejected_rewards
        metrics = {
            **_reward_metrics((weights * chosen_rewards).sum(-1), (weights * rejected_rewards).sum(-1)),
            "logps/chosen": chosen.logps.mean(-1),
            "logps/rejected": rejected.logps.mean(-1),
        }
        for dimension, name in enumerate(names):
            metrics[f"rewards/margins/{name}"] = margins[:, dimension]
            metrics[f"rewards/accuracies/{name}"] = margins[:, dimension] > 0
            metrics[f"weights/{name}"] = weights[:, dimension]
        return self._weighted_losses(chosen, rejected, weights), metrics

    def prompt_losses(self, whole: CompletionScores, inputs: Batch) -> Losses:
        """The weights need the token probabilities of all prompts, but no gradient; the loss is a sum over prompts."""
        weights = self._weights(*by_side(whole, len(self.method.prompt_names)), inputs)

        def losses(scores: CompletionScores, inputs: Batch) -> Tensor:
            first, end = inputs["prompts"]
            return self._weighted_losses(*by_side(scores, end - first), weights[:, first:end])

        return losses

    def _weighted_losses(self, chosen: CompletionScores, rejected: CompletionScores, weights: Tensor) -> Tensor:
        """Losses [b] of b pairs, or what some of their prompts contribute: scores and weights are [b, D] or less."""
        method = self.method
        losses, _ = amopo_loss(
            chosen.logps,
            rejected.logps,
            chosen.lengths,
            rejected.lengths,
            weights,
            beta=method.beta,
            gamma=method.gamma,
            loss_type=method.loss_type,
        )
        if method.sft_coef:
            losses = losses - method.sft_coef * (chosen.logps / chosen.lengths).sum(-1) / len(method.prompt_names)
        return losses

    def _weights(self, chosen: CompletionScores, rejected: CompletionScores, inputs: Batch) -> Tensor:
        if self._fixed_weights is not None:
            return self._fixed_weights.expand_as(chosen.prob_mean)
        drawn = self.method.weighting == "gaussian" and self.model.training
        pairs = inputs["pairs"]

        def among_all(values: Tensor) -> Tensor:
            return values.new_zeros(inputs["size"], values.shape[1]).index_copy(0, pairs, values)

        # Drawn for the whole micro-batch, so that a pair's draw is the same in whatever pass it is.
        return adaptive_weights(
            among_all(chosen.prob_mean),
            among_all(chosen.prob_std),
            among_all(rejected.prob_mean),
            among_all(rejected.prob_std),
            scheme="gaussian" if drawn else "mean",
            temperature=self.method.temperature,
            generator=self._draw_generator() if drawn else None,
        )[pairs]

    def _draw_generator(self) -> torch.Generator:
        """A generator for this micro-batch alone, so that a resumed run draws what an undisturbed one would."""
        step, number = self._micro_batch
        moment = f"{self.args.seed} {self.args.process_index} {step} {number}"
        seed = random.Random(moment).getrandbits(63)  # noqa: S311 (no secret)
        return torch.Generator(device=self.args.device).manual_seed(seed)


class MODPOTrainer(MultiObjectiveTrainer):
    """`rl: modpo` (arXiv 2310.03708): DPO on one objective, with the other objectives as a margin.

    The reference is the policy before its first step; its log-probs are computed once, so one model is enough.
    """

    block: ClassVar = MODPOConfig
    method: MODPOConfig
    tag_names: ClassVar = ["axolotl", "modpo"]
    citation: ClassVar = """@inproceedings{zhou2024modpo,
  title     = {Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference Optimization},
  author    = {Zhou, Zhanhui and Liu, Jie and Shao, Jing and Yue, Xiangyu and Yang, Chao and Ouyang, Wanli and
               Qiao, Yu},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2024},
  year      = {2024},
  note      = {arXiv:2310.03708}
}"""

    def __init__(self, model: PreTrainedModel | PeftModel, *, args: Any, **kwargs: Any) -> None:
        super().__init__(model, args=args, **kwargs)
        self._margin_weights = torch.tensor(self.method.margin_weights, device=args.device)
        LOG.info("MODPO's effective beta / w_k is %g.", self.method.beta / self.method.objective_weight)
        self._constants: dict[str, Constants] = {}
        self._tables: Constants | None = None
        self._warned: set[str] = set()
        self.start: dict[str, str] = {}
        self.add_callback(StartCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; constants are computed before the first step, or before the weights of a resumed run are loaded.

        Raises:
            ConfigError: where a run whose weights are split is resumed without the constants of its first start.
        """
        if resume_from_checkpoint:
            last = get_last_checkpoint(str(self.args.output_dir)) if resume_from_checkpoint is True else None
            resume_from_checkpoint = last or resume_from_checkpoint
            if resume_from_checkpoint is not True:  # without a checkpoint transformers raises its own error
                self.precompute(self.model, recorded=self._recorded_start(Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _recorded_start(self, checkpoint: Path) -> dict[str, str] | None:
        """What a checkpoint says of the start of its run; None where this process still has the weights of then."""
        if not self._is_sharded:
            return None
        start = fault = None
        if self.is_world_process_zero():  # which wrote it; other machines may not have the file
            try:
                start = read_start(checkpoint)
            except ValueError as error:
                fault = str(error)
        start, fault = broadcast_object_list([start, fault])
        if start is None:
            missing = (
                f"{checkpoint} holds no {START_FILE}, without which the reference of a run whose weights are split "
                "cannot be found again; resume from another checkpoint, or start the run anew"
            )
            raise ConfigError(f"`resume_from_checkpoint`: {fault or missing}")
        return start

    def before_first_step(self, wrapped: nn.Module, resumed: bool) -> None:
        """As for every method; then the reference and the margins are computed, but for a resumed run."""
        super().before_first_step(wrapped, resumed)
        if not resumed:
            self.precompute(wrapped)
            self.check_start(wrapped)

    def evaluate(self, eval_dataset: Dataset | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; before any training the policy as it stands is its own initial reference."""
        self._require_prepared()
        foreign = eval_dataset is not None and "pair_index" not in eval_dataset.column_names
        if (foreign or "evaluation" not in self._constants) and self.method.reference == "initial":
            LOG.warning("The policy is evaluated against itself as it stands now: no reference was computed before.")
        if eval_dataset is not None and foreign:
            return self._evaluate_foreign(eval_dataset, *args, **kwargs)
        if "evaluation" not in self._constants:
            self.precompute(self.model, train=self._normalised)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _evaluate_foreign(self, rows: Dataset, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate rows that the trainer was not built with, as `axolotl evaluate` asks for."""
        rows, tables = _numbered(with_lengths(rows), 0), self._tables
        sets = {"evaluation": rows, **({"train": self.train_dataset} if self._normalised else {})}
        constants = self._precomputation(self.model).constants(sets)["evaluation"]
        self._tables = Constants(*(part.float().to(self.args.device) for part in constants))
        try:
            return super().evaluate(rows, *args, **kwargs)
        finally:
            self._tables = tables

    @property
    def _normalised(self) -> bool:
        return any(margin.normalize != "none" for margin in self.method.margins.values())

    def _precomputation(self, wrapped: nn.Module, recorded: dict[str, str] | None = None) -> Precomputation:
        cache = TableCache(Path(str(self.method.cache_dir)), self.accelerator)
        return Precomputation(self.method, self.model, self._pair_scorer(wrapped), cache, recorded)

    def _pair_scorer(self, wrapped: nn.Module) -> PairScorer:
        batch_size = self.args.per_device_train_batch_size
        return PairScorer(wrapped, self.scorer, self.data_collator, self.accelerator, self.pass_counts, batch_size)

    def precompute(self, wrapped: nn.Module, train: bool = True, recorded: dict[str, str] | None = None) -> None:
        """Compute the reference log-probs and margins of rows with the policy as it stands, or find them.

        Args:
            wrapped: the policy as it is run.
            train: of the training rows, and not of those for evaluation alone.
            recorded: the `start` of the run that is resumed, where the policy cannot be run as it was then.
        """
        precomputation = self._precomputation(wrapped, recorded)
        self.start = precomputation.start
        sets = {"train": self.train_dataset} if train else {}
        if self.eval_dataset is not None:
            sets["evaluation"] = self.eval_dataset
        self._constants = precomputation.constants(sets)
        parts = list(self._constants.values())
        if not train:  # `pair_index` counts the training rows all the same
            shape = (len(self.train_dataset), 2)
            parts.insert(0, Constants(torch.empty(shape), torch.empty(*shape, len(self.method.margins))))
        self._tables = Constants(*(torch.cat(part).float().to(self.args.device) for part in zip(*parts, strict=True)))
        self._reference_is_policy = precomputation.reference_is_policy

    def check_start(self, wrapped: nn.Module) -> None:
        """Hold the policy, as it is trained, against the reference that it must still be.

        Raises:
            RuntimeError: where its log-probs differ by more than its precision explains.
        """
        if not self._reference_is_policy:
            LOG.info("The reference is the base model; the policy starts with an adapter that changes it.")
            return
        LOG.info("The reference is the policy before its first step.")
        rows = self._checked_rows
        wrapped.train()
        logps = self._pair_scorer(wrapped).logps(rows, title=None)
        lengths = torch.tensor([[len(row["chosen_input_ids"]), len(row["rejected_input_ids"])] for row in rows])
        assert self._tables  # noqa: S101 (computed just before)
        expected = self._tables.reference[: len(rows)]
        difference = ((logps - expected).abs().cpu() / lengths).max().item()
        if not difference <= self._tolerance:
            raise RuntimeError(
                f"before the first step the policy's log-probs differ from the reference's by {difference:.3g} nats a "
                f"token, more than {self._tolerance:g}; look for dropout or noise that is on in training, "
                "for weights that changed after the reference was computed, or for a foreign file in "
                f"{self.method.cache_dir}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and warn once of a margin whose scale is far from the implied reward's."""
        super().log(logs, start_time)
        implied = logs.get("rewards/margins_std")
        for name, weight in zip(self.method.margins, self.method.margin_weights, strict=True):
            spread = abs(weight / self.method.objective_weight) * logs.get(f"margins_std/{name}", 0.0)
            if not implied or not spread or 0.1 <= spread / implied <= 10 or name in self._warned:
                continue
            self._warned.add(name)
            LOG.warning(
                "The margin %s, weighted, spreads %.3g times as wide as the implied reward of %s; only its scale "
                "against that reward matters, so mind its `scale`, its `normalize` or its weight.",
                name,
                spread / implied,
                self.method.objective,
            )

    def pair_losses(self, scores: CompletionScores, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `losses.modpo_loss`.

        `rewards/...` are the implied rewards of the objective that orders the pairs, `rewards/collective_...` are
        beta * (logp - ref_logp), the reward of all objectives together.
        """
        method = self.method
        policy_chosen_logps, policy_rejected_logps = scores.logps.view(-1, 2).unbind(-1)
        assert self._tables  # noqa: S101 (computed before the first step)
        index = inputs["pair_index"][inputs["pairs"]]
        ref_chosen_logps, ref_rejected_logps = self._tables.reference[index].unbind(-1)
        chosen_margins, rejected_margins = self._tables.margins[index].unbind(1)
        losses, chosen_rewards, rejected_rewards = modpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_margins,
            rejected_margins,
            beta=method.beta,
            objective_weight=method.objective_weight,
            margin_weights=self._margin_weights,
            loss_type=method.loss_type,
        )
        collective_chosen = method.beta * (policy_chosen_logps - ref_chosen_logps)
        collective_rejected = method.beta * (policy_rejected_logps - ref_rejected_logps)
        metrics = {
            **_reward_metrics(chosen_rewards, rejected_rewards),
            "rewards/collective_chosen": collective_chosen,
            "rewards/collective_rejected": collective_rejected,
            "rewards/collective_margins": collective_chosen - collective_rejected,
            "logps/chosen": policy_chosen_logps,
            "logps/rejected": policy_rejected_logps,
        }
        for margin, name in enumerate(method.margins):
            metrics[f"margins/{name}/chosen"] = chosen_margins[:, margin]
            metrics[f"margins/{name}/rejected"] = rejected_margins[:, margin]
            metrics[f"margins/{name}"] = chosen_margins[:, margin] - rejected_margins[:, margin]
        return losses, metrics


class _BeforeFirstStep(TrainerCallback):
    """Calls a trainer once its model is prepared."""

    def __init__(self, trainer: MultiObjectiveTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The model is prepared, a checkpoint loaded where the run is resumed, and no step was made."""
        self.trainer.before_first_step(self.trainer.model_wrapped, resumed=state.global_step > 0)


def choose_log_softmax(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The cheapest on a device: on a GPU the host's kernel, which it puts into TRL's module when it loads a model."""
    return trl.trainer.utils.selective_log_softmax if device.type == "cuda" else selective_log_softmax


def _numbered(rows: Dataset, first: int) -> Dataset:
    if "pair_index" in rows.column_names:  # of another trainer on the same rows
        rows = rows.remove_columns("pair_index")
    return with_numbers(rows, "pair_index", np.arange(first, first + len(rows)))


def _reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
    }

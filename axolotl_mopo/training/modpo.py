"""`rl: modpo` (arXiv 2310.03708)."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from axolotl.utils.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from axolotl_mopo.config import MODPOConfig
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.logprobs.computer import CompletionLogProbs
from axolotl_mopo.losses import modpo_loss
from axolotl_mopo.training.base import MultiObjectiveTrainer, numbered, reward_metrics
from axolotl_mopo.training.callbacks import START, StartCallback, read_start
from axolotl_mopo.training.collator import read_tokens
from axolotl_mopo.training.microbatching import Part
from axolotl_mopo.training.pair_logprobs import PairLogProbs
from axolotl_mopo.training.precompute import Constants, Precomputation
from axolotl_mopo.training.prepared_rows import with_lengths
from axolotl_mopo.training.table_cache import TableCache

LOG = get_logger("axolotl.mopo")


class MODPOTrainer(MultiObjectiveTrainer):
    """`rl: modpo` (arXiv 2310.03708): DPO on one objective, with the other objectives as a margin.

    Reference log-probs and margin rewards are computed once before the first step, so only the policy is in memory
    during training.
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
        """Train. Constants are computed before the first step, or before the checkpoint of a resumed run is loaded.

        Raises:
            ConfigError: if a run with sharded weights is resumed without the constants of its first start.
        """
        if resume_from_checkpoint:
            last = get_last_checkpoint(str(self.args.output_dir)) if resume_from_checkpoint is True else None
            resume_from_checkpoint = last or resume_from_checkpoint
            if resume_from_checkpoint is not True:  # without a checkpoint transformers raises its own error
                self.precompute(self.model, recorded=self._recorded_start(Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _recorded_start(self, checkpoint: Path) -> dict[str, str] | None:
        """Read what a checkpoint records of the start of its run; None if this process still has these weights."""
        if not self.is_sharded:
            return None
        start = message = None
        if self.is_world_process_zero():  # the file may be only on its machine
            try:
                start = read_start(checkpoint)
            except ValueError as error:
                message = str(error)
        start, message = broadcast_object_list([start, message])
        if start is None:
            missing = (
                f"{checkpoint} contains no {START}, which is needed to find the reference log-probs of a run with "
                "sharded weights; resume from another checkpoint, or start a new run"
            )
            raise ConfigError(f"`resume_from_checkpoint`: {message or missing}")
        return start

    def before_first_step(self, wrapped: nn.Module, resumed: bool) -> None:
        """See `MultiObjectiveTrainer`. Unless the run is resumed, also compute and check the constants."""
        super().before_first_step(wrapped, resumed)
        if not resumed:
            self.precompute(wrapped)
            self.check_start(wrapped)

    def evaluate(self, eval_dataset: Dataset | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate. Without reference log-probs from before training, `reference: initial` is the current policy."""
        self.require_prepared()
        is_new = eval_dataset is not None and "pair_index" not in eval_dataset.column_names
        if (is_new or "evaluation" not in self._constants) and self.method.reference == "initial":
            LOG.warning(
                "The policy is evaluated against its current weights as the reference, since no reference log-probs "
                "were computed before training."
            )
        if eval_dataset is not None and is_new:
            return self._evaluate_new_rows(eval_dataset, *args, **kwargs)
        if "evaluation" not in self._constants:
            self.precompute(self.model, train=self._normalised)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _evaluate_new_rows(self, rows: Dataset, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate rows that are not the trainer's own, as `axolotl evaluate` does."""
        rows, tables = numbered(with_lengths(rows), 0), self._tables
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
        return Precomputation(self.method, self.model, self._pair_logprobs(wrapped), cache, recorded)

    def _pair_logprobs(self, wrapped: nn.Module) -> PairLogProbs:
        batch_size = self.args.per_device_train_batch_size
        return PairLogProbs(
            wrapped, self.logprob_computer, self.data_collator, self.accelerator, self.pass_counts, batch_size
        )

    def precompute(self, wrapped: nn.Module, train: bool = True, recorded: dict[str, str] | None = None) -> None:
        """Compute the reference log-probs and margin rewards with the current policy, or read them from the cache.

        Args:
            wrapped: the policy as it is run.
            train: whether to include the training rows; otherwise only the evaluation rows.
            recorded: the `start` of a resumed run with sharded weights, whose initial policy cannot be run.
        """
        precomputation = self._precomputation(wrapped, recorded)
        self.start = precomputation.start
        sets = {"train": self.train_dataset} if train else {}
        if self.eval_dataset is not None:
            sets["evaluation"] = self.eval_dataset
        self._constants = precomputation.constants(sets)
        parts = list(self._constants.values())
        if not train:  # `pair_index` still counts the training rows
            shape = (len(self.train_dataset), 2)
            parts.insert(0, Constants(torch.empty(shape), torch.empty(*shape, len(self.method.margins))))
        self._tables = Constants(*(torch.cat(part).float().to(self.args.device) for part in zip(*parts, strict=True)))
        self._reference_is_policy = precomputation.reference_is_policy

    def check_start(self, wrapped: nn.Module) -> None:
        """Check that the policy in training mode still has the log-probs of the reference.

        Raises:
            RuntimeError: if its log-probs differ by more than its precision explains.
        """
        if not self._reference_is_policy:
            LOG.info("The reference is the base model; the policy starts with an adapter that differs from it.")
            return
        LOG.info("The reference is the policy before its first step.")
        rows = self.checked_rows
        wrapped.train()
        logps = self._pair_logprobs(wrapped).logps(rows, title=None)
        lengths = torch.tensor([[len(one.scored) for one in read_tokens(row).completions[:2]] for row in rows])
        assert self._tables  # noqa: S101 (computed just before)
        expected = self._tables.reference[: len(rows)]
        difference = ((logps - expected).abs().cpu() / lengths).max().item()
        if not difference <= self.tolerance:
            raise RuntimeError(
                f"before the first step the policy's log-probs differ from the reference's by {difference:.3g} nats "
                f"per token, more than {self.tolerance:g}; check for dropout or noise that is on in training, for "
                "weights that changed after the reference was computed, and for a file of another run in "
                f"{self.method.cache_dir}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and warn once for each margin whose scale is far from that of the implicit reward."""
        super().log(logs, start_time)
        implicit = logs.get("rewards/margins_std")
        for name, weight in zip(self.method.margins, self.method.margin_weights, strict=True):
            deviation = abs(weight / self.method.objective_weight) * logs.get(f"margins_std/{name}", 0.0)
            if not implicit or not deviation or 0.1 <= deviation / implicit <= 10 or name in self._warned:
                continue
            self._warned.add(name)
            LOG.warning(
                "The standard deviation of the weighted margin %s is %.3g times that of the implicit reward of %s. "
                "Only this ratio matters; check the margin's `scale`, `normalize` and weight.",
                name,
                deviation / implicit,
                self.method.objective,
            )

    def pair_losses(self, logprobs: CompletionLogProbs, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """See `losses.modpo_loss`.

        `rewards/...` are the implicit rewards of the objective that orders the pairs. `rewards/collective_...` are
        beta * (logp - ref_logp), the reward of all objectives together.
        """
        method = self.method
        policy_chosen_logps, policy_rejected_logps = logprobs.logps.view(-1, 2).unbind(-1)
        assert self._tables and part.rows is not None  # noqa: S101 (computed before the first step)
        ref_chosen_logps, ref_rejected_logps = self._tables.reference[part.rows].unbind(-1)
        chosen_margin_rewards, rejected_margin_rewards = self._tables.margins[part.rows].unbind(1)
        losses, chosen_rewards, rejected_rewards = modpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_margin_rewards,
            rejected_margin_rewards,
            beta=method.beta,
            objective_weight=method.objective_weight,
            margin_weights=self._margin_weights,
            loss_type=method.loss_type,
        )
        collective_chosen = method.beta * (policy_chosen_logps - ref_chosen_logps)
        collective_rejected = method.beta * (policy_rejected_logps - ref_rejected_logps)
        metrics = {
            **reward_metrics(chosen_rewards, rejected_rewards),
            "rewards/collective_chosen": collective_chosen,
            "rewards/collective_rejected": collective_rejected,
            "rewards/collective_margins": collective_chosen - collective_rejected,
            "logps/chosen": policy_chosen_logps,
            "logps/rejected": policy_rejected_logps,
        }
        for margin, name in enumerate(method.margins):
            metrics[f"margins/{name}/chosen"] = chosen_margin_rewards[:, margin]
            metrics[f"margins/{name}/rejected"] = rejected_margin_rewards[:, margin]
            metrics[f"margins/{name}"] = chosen_margin_rewards[:, margin] - rejected_margin_rewards[:, margin]
        return losses, metrics

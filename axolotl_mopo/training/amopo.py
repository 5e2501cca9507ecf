"""`rl: amopo` (arXiv 2506.07165)."""

import random
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_mopo.config import AMoPOConfig
from axolotl_mopo.logprobs.computer import CompletionLogProbs, by_side
from axolotl_mopo.losses import adaptive_weights, amopo_loss
from axolotl_mopo.training.base import MultiObjectiveTrainer, reward_metrics
from axolotl_mopo.training.microbatching import Collated, Losses, Part


class AMoPOTrainer(MultiObjectiveTrainer):
    """`rl: amopo` (arXiv 2506.07165): one prompt per dimension, no reward model and no reference model."""

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

    def training_step(
        self, model: nn.Module, inputs: Collated, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Count the micro-batch within its optimizer step, then run the shared step."""
        step, number = self._micro_batch
        self._micro_batch = (self.state.global_step, number + 1 if step == self.state.global_step else 1)
        return super().training_step(model, inputs, num_items_in_batch)

    def pair_losses(self, logprobs: CompletionLogProbs, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """See `losses.amopo_loss`.

        The reward of a dimension is beta * logp / length. Metrics of rewards without a dimension in their name are the
        sum over dimensions, weighted by alpha.
        """
        method, names = self.method, self.method.prompt_names
        chosen, rejected = by_side(logprobs, len(names))
        weights = self._weights(chosen, rejected, part)
        chosen_rewards = method.beta * chosen.logps.detach() / chosen.lengths
        rejected_rewards = method.beta * rejected.logps.detach() / rejected.lengths
        margins = chosen_rewards - rejected_rewards
        metrics = {
            **reward_metrics((weights * chosen_rewards).sum(-1), (weights * rejected_rewards).sum(-1)),
            "logps/chosen": chosen.logps.mean(-1),
            "logps/rejected": rejected.logps.mean(-1),
        }
        for dimension, name in enumerate(names):
            metrics[f"rewards/margins/{name}"] = margins[:, dimension]
            metrics[f"rewards/accuracies/{name}"] = margins[:, dimension] > 0
            metrics[f"weights/{name}"] = weights[:, dimension]
        return self._weighted_losses(chosen, rejected, weights), metrics

    def prompt_losses(self, whole: CompletionLogProbs, part: Part) -> Losses:
        """See `MicrobatchMixin`. The loss is a sum over prompts; the weights need the probabilities of all prompts."""
        weights = self._weights(*by_side(whole, len(self.method.prompt_names)), part)

        def losses(logprobs: CompletionLogProbs, part: Part) -> Tensor:
            assert part.prompts  # noqa: S101 (the pair is split)
            first, end = part.prompts
            return self._weighted_losses(*by_side(logprobs, end - first), weights[:, first:end])

        return losses

    def _weighted_losses(self, chosen: CompletionLogProbs, rejected: CompletionLogProbs, weights: Tensor) -> Tensor:
        """Losses [b] of b pairs, or what some of their prompts contribute to them.

        Log-probs and weights are [b, D], or [b, d] for d of the D prompts.
        """
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

    def _weights(self, chosen: CompletionLogProbs, rejected: CompletionLogProbs, part: Part) -> Tensor:
        if self._fixed_weights is not None:
            return self._fixed_weights.expand_as(chosen.prob_mean)
        drawn = self.method.weighting == "gaussian" and self.model.training

        def among_all(values: Tensor) -> Tensor:
            return values.new_zeros(part.size, values.shape[1]).index_copy(0, part.pairs, values)

        # Drawn for the whole micro-batch, so that a pair's draw does not depend on the pass that it is in.
        return adaptive_weights(
            among_all(chosen.prob_mean),
            among_all(chosen.prob_std),
            among_all(rejected.prob_mean),
            among_all(rejected.prob_std),
            scheme="gaussian" if drawn else "mean",
            temperature=self.method.temperature,
            generator=self._draw_generator() if drawn else None,
        )[part.pairs]

    def _draw_generator(self) -> torch.Generator:
        """Seed a generator for this micro-batch, so that a resumed run draws the same as an uninterrupted one."""
        step, number = self._micro_batch
        key = f"{self.args.seed} {self.args.process_index} {step} {number}"
        seed = random.Random(key).getrandbits(63)  # noqa: S311 (not a secret)
        return torch.Generator(device=self.args.device).manual_seed(seed)

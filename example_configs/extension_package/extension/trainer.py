"""The method's trainer, which Axolotl imports when it needs it."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_mopo.logprobs.computer import CompletionLogProbs, by_side
from axolotl_mopo.training.base import MultiObjectiveTrainer
from axolotl_mopo.training.microbatching import Losses, Part
from extension.method import TchebycheffConfig


class TchebycheffTrainer(MultiObjectiveTrainer):
    """`rl: tchebycheff`: the loss of a pair is a smooth maximum over its dimensions, so that the worst one counts most.

    The maximum is that of arXiv 2402.19078 with equal weights, the loss of a dimension that of SimPO without gamma.
    """

    block: ClassVar = TchebycheffConfig
    tag_names: ClassVar = ["axolotl", "tchebycheff"]
    citation: ClassVar = """@inproceedings{lin2024smooth,
  title     = {Smooth {Tchebycheff} Scalarization for Multi-Objective Optimization},
  author    = {Lin, Xi and Zhang, Xiaoyuan and Yang, Zhiyuan and Liu, Fei and Wang, Zhenkun and Zhang, Qingfu},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}"""

    def pair_losses(self, logprobs: CompletionLogProbs, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """mu * log sum_d exp(loss_d / mu), and for the log the loss of every dimension."""
        mu, names = self.method.mu, self.method.prompt_names
        losses = self._losses(logprobs, len(names))
        return mu * torch.logsumexp(losses / mu, -1), {f"losses/{name}": losses[:, d] for d, name in enumerate(names)}

    def prompt_losses(self, whole: CompletionLogProbs, part: Part) -> Losses:
        """The same as a sum over prompts, sum_d p_d * (loss_d - mu * log p_d) with p = softmax(loss / mu)."""
        mu = self.method.mu
        log_p = torch.log_softmax(self._losses(whole, len(self.method.prompt_names)) / mu, -1)

        def losses(logprobs: CompletionLogProbs, part: Part) -> Tensor:
            first, end = part.prompts
            own = log_p[:, first:end]
            return (own.exp() * (self._losses(logprobs, end - first) - mu * own)).sum(-1)

        return losses

    def _losses(self, logprobs: CompletionLogProbs, prompts: int) -> Tensor:
        """SimPO's loss of every dimension, [b, D]."""
        chosen, rejected = by_side(logprobs, prompts)
        return -F.logsigmoid(self.method.beta * (chosen.logps / chosen.lengths - rejected.logps / rejected.lengths))

"""The mathematics of MODPO and AMoPO: pure tensor functions without state.

Notation: B pairs, J margin rewards, D dimension prompts; a log-prob is summed over the tokens of one completion, the
end-of-turn token included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_mopo.choices import AMoPOLossType, DrawScheme, MODPOLossType


def modpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_margin_rewards: Tensor,
    rejected_margin_rewards: Tensor,
    *,
    beta: float,
    objective_weight: float,
    margin_weights: Tensor,
    loss_type: MODPOLossType = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """MODPO: DPO on one objective with the other objectives as a margin (arXiv 2310.03708, section 3.2).

    With `s(y) = (beta * (logp(y) - ref_logp(y)) - sum_j w_j r_j(y)) / w_k`, the loss is `-log sigmoid(s(y_w) - s(y_l))`
    (`sigmoid`), or `relu(1 - (s(y_w) - s(y_l)))` (`hinge`, as in the authors' code).

    Args:
        policy_chosen_logps, policy_rejected_logps: log-probs under the policy, [B].
        ref_chosen_logps, ref_rejected_logps: log-probs under the reference, [B].
        chosen_margin_rewards, rejected_margin_rewards: rewards r_j of the other objectives, [B, J]; J may be 0.
        beta: strength of the KL penalty towards the reference.
        objective_weight: w_k, the weight of the objective that orders the pairs; positive.
        margin_weights: w_j, [J].
        loss_type: `sigmoid` or `hinge`.

    Returns:
        losses [B], and the implicit rewards s of chosen and rejected [B], detached.
    """
    chosen_rewards = (
        beta * (policy_chosen_logps - ref_chosen_logps) - chosen_margin_rewards @ margin_weights
    ) / objective_weight
    rejected_rewards = (
        beta * (policy_rejected_logps - ref_rejected_logps) - rejected_margin_rewards @ margin_weights
    ) / objective_weight
    logits = chosen_rewards - rejected_rewards
    match loss_type:
        case "sigmoid":
            losses = -F.logsigmoid(logits)
        case "hinge":
            losses = torch.relu(1 - logits)
        case _:
            raise ValueError(f"unknown loss_type {loss_type!r}: use 'sigmoid' or 'hinge'")
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def amopo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    weights: Tensor,
    *,
    beta: float,
    gamma: float,
    loss_type: AMoPOLossType = "simpo",
) -> tuple[Tensor, Tensor]:
    """AMoPO: a weighted sum over dimension prompts of a reference-free pair loss (arXiv 2506.07165, section 3).

    With the length-normalised `a = logp / length`, the loss of one dimension is
    `-log sigmoid(beta * (a_w - a_l) - gamma)` (`simpo`: SimPO, arXiv 2405.14734, eq. 6), or
    `-a_w - beta * log sigmoid(log odds(a_w) - log odds(a_l))` (`orpo`: ORPO, arXiv 2403.07691, eqs. 6 and 7).

    Args:
        chosen_logps, rejected_logps: log-probs of the completions under each dimension's prompt, [B, D].
        chosen_lengths, rejected_lengths: completion tokens, [B, D].
        weights: alpha, [B, D], summing to 1 over D; no gradient flows through them.
        beta: scale of the reward.
        gamma: target margin of `simpo`; `orpo` ignores it.
        loss_type: `simpo` or `orpo`.

    Returns:
        losses [B], and the losses of the dimensions before weighting [B, D].
    """
    chosen = chosen_logps / chosen_lengths
    rejected = rejected_logps / rejected_lengths
    match loss_type:
        case "simpo":
            per_dimension_losses = -F.logsigmoid(beta * (chosen - rejected) - gamma)
        case "orpo":
            per_dimension_losses = -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
        case _:
            raise ValueError(f"unknown loss_type {loss_type!r}: use 'simpo' or 'orpo'")
    return (weights.detach() * per_dimension_losses).sum(-1), per_dimension_losses


def adaptive_weights(
    chosen_prob_mean: Tensor,
    chosen_prob_std: Tensor,
    rejected_prob_mean: Tensor,
    rejected_prob_std: Tensor,
    *,
    scheme: DrawScheme = "gaussian",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """AMoPO: weights of the dimensions from the policy's token probabilities (arXiv 2506.07165, section 3).

    `gaussian` draws one number from N(mean, std^2) for the chosen and one for the rejected completion; `mean` uses the
    means. A softmax over the dimensions of each pair turns their sum into weights.

    Args:
        chosen_prob_mean, chosen_prob_std, rejected_prob_mean, rejected_prob_std: mean and standard deviation of the
            token probabilities of each completion, [B, D].
        scheme: `gaussian` or `mean`.
        temperature: divides the sum before the softmax; the paper uses 1.
        generator: source of the draws, on the tensors' device; torch's global generator if None.

    Returns:
        weights [B, D], summing to 1 over D, detached.
    """
    logits = (chosen_prob_mean + rejected_prob_mean).detach()
    match scheme:
        case "gaussian":
            for std in (chosen_prob_std, rejected_prob_std):
                noise = torch.randn(std.shape, generator=generator, dtype=std.dtype, device=std.device)
                logits = logits + std.detach() * noise
        case "mean":
            pass
        case _:
            raise ValueError(f"unknown scheme {scheme!r}: use 'gaussian' or 'mean'")
    return torch.softmax(logits / temperature, dim=-1)


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-prob, accurate near p = 0 and p = 1; p = 1 is replaced by the largest p below 1."""
    below_one = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near_one = below_one > -0.6931471805599453
    log_complement = torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, below_one, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, below_one))),
    )
    return below_one - log_complement

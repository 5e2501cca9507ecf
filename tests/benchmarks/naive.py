"""A step as the papers' released code computes it: padded rows, float32 logits of every token, nothing shared.

AMoPO's (github.com/Javkonline/AMoPO, d8caba0) hands the labels to the model, which computes a cross-entropy that nobody
asks for, takes a second softmax over the vocabulary for the weights, gathers chosen and rejected logits for their means
in the log, and draws a weight at a time. MODPO's (github.com/ZHZisZZ/modpo, 2e2df20) runs the policy, its reference,
the margin's model and the margin's reference in every step.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_mopo.logprobs.trees import Pair


def pad_rows(pairs: Sequence[Pair], device: str) -> dict[str, Tensor]:
    """Every prompt with each completion, chosen ones first, padded to the longest: ids, mask, labels [C, T]."""
    sequences = [(prompt, pair.chosen) for pair in pairs for prompt in pair.prompts]
    sequences += [(prompt, pair.rejected) for pair in pairs for prompt in pair.prompts]
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        labels[row, len(prompt) : end] = input_ids[row, len(prompt) : end]
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: values.to(device) for name, values in batch.items()}


def _shifted(labels: Tensor) -> tuple[Tensor, Tensor]:
    labels = labels[:, 1:]
    return labels.clamp(min=0), labels != -100


def _logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return (logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * mask).sum(-1)


def amopo_step(model: Any, batch: dict[str, Tensor], dimensions: int) -> Tensor:
    """AMoPO's loss with drawn weights."""
    all_logits = model(**batch, use_cache=False).logits.float()
    logits, (labels, mask) = all_logits[:, :-1], _shifted(batch["labels"])
    rewards = (_logps(logits, labels, mask) / mask.sum(-1)).view(2, -1, dimensions)
    probs = logits.softmax(-1).gather(-1, labels[..., None])[..., 0].clone().detach()
    draws = []
    for row, own in zip(probs, mask, strict=True):
        draws.append(torch.normal(row[own].mean(), row[own].std()).item())
    weights = torch.tensor(draws, device=probs.device).view(2, -1, dimensions).sum(0).softmax(-1)
    loss = -(weights * F.logsigmoid(0.8 * (rewards[0] - rewards[1]) - 2.0)).sum(-1).mean()
    for side in all_logits.split(len(all_logits) // 2):
        torch.cat(side.split(1)).detach().mean().cpu()
    return loss


def modpo_step(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """MODPO's loss with one margin, weights 0.5 and 0.5, beta 0.1; every model has the policy's weights."""

    def logps() -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits.float()
        return _logps(logits[:, :-1], *_shifted(batch["labels"])).view(2, -1)

    policy = logps()
    with torch.no_grad():
        reference, margin, margin_reference = logps(), logps(), logps()
    rewards = (0.1 * (policy - reference) - 0.5 * 0.1 * (margin - margin_reference)) / 0.5
    return -F.logsigmoid(rewards[0] - rewards[1]).mean()

"""Computes log-probs of the completions of prepared rows, for the reference and for implicit rewards."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, tqdm
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from axolotl_mopo.errors import ConfigError, NoiseError
from axolotl_mopo.logprobs.attention import plain_implementation, use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.logprobs.layout import choose_layout, turn_off_noise
from axolotl_mopo.logprobs.passes import PassCounts
from axolotl_mopo.rewards.loading import language_model_class, load_whole
from axolotl_mopo.training.collator import PairCollator, read_tokens


@dataclass(frozen=True)
class PairLogProbs:
    """Computes log-probs of pairs with a single prompt under a model.

    Args:
        model: the model as it is run, possibly wrapped.
        computer: computes the log-probs of a batch.
        collator: makes the batches.
        accelerator: defines device and precision.
        pass_counts: finds the number of dummy forward passes of this rank.
        batch_size: number of rows in a batch.
    """

    model: nn.Module
    computer: LogProbComputer
    collator: PairCollator
    accelerator: Accelerator
    pass_counts: PassCounts
    batch_size: int

    @torch.no_grad()
    def logps(self, rows: Dataset, title: str | None) -> Tensor:
        """Compute the log-probs [N, 2] of the chosen and rejected completions of N rows, without gradient, in float32.

        Args:
            rows: prepared rows, the same number on every rank.
            title: title of the progress bar; None for no progress bar.
        """
        pinned = self.accelerator.device.type == "cuda"
        loader = DataLoader(rows, batch_size=self.batch_size, collate_fn=self.collator, pin_memory=pinned)
        quiet = title is None or not self.accelerator.is_main_process
        return torch.cat([self._batch_logps(batch) for batch in tqdm(loader, desc=title, disable=quiet)])

    def of(self, model: Any) -> "PairLogProbs":
        """Return a copy for another model of the same architecture."""
        base = None if self.computer.base is None else model
        return replace(self, model=model, computer=replace(self.computer, base=base))

    def _batch_logps(self, batch: Mapping[str, Any]) -> Tensor:
        device = self.accelerator.device
        batch = send_to_device(batch, device, non_blocking=True)
        passes = [one for group in batch["groups"] for one in group]
        logps = torch.empty(batch["size"], 2, device=device)
        (dummies,) = self.pass_counts.missing(len(passes))
        with self.accelerator.autocast():
            for one in passes + passes[-1:] * dummies:
                logps[one["pairs"]] = self.computer(self.model, one).logps.view(-1, 2).float()
        return logps


def without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager that turns off the adapters of the model, if it has any."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


@contextmanager
def separate_model(
    path: str, like: PreTrainedModel, dtype: torch.dtype, policy: PairLogProbs, rows: Dataset
) -> Iterator[PairLogProbs]:
    """Context manager that loads a whole model and yields a `PairLogProbs` for it.

    Args:
        path: a folder or a model of the hub.
        like: the policy's model; the loaded model gets the same attention implementation.
        dtype: dtype of its weights.
        policy: the `PairLogProbs` of the policy.
        rows: prepared rows; the layout is tried on the first.

    Raises:
        ConfigError: if its weights cannot be read, or it adds noise in training.
        ValueError: if its vocabulary has another size than the policy's.
    """
    kind = language_model_class(path)
    model = load_whole(kind, path, dtype, attn_implementation=plain_implementation(like))
    model.to(policy.accelerator.device)
    size, expected = (each.config.get_text_config().vocab_size for each in (model, like))
    if size != expected:
        raise ValueError(
            f"{path} has a vocabulary of {size} tokens and the policy one of {expected}; give a model with the "
            "policy's own tokenizer, which an implicit reward needs"
        )
    turn_off_noise(model)
    model.eval()
    try:
        layout = choose_layout(model, model, [read_tokens(rows[0])])
    except NoiseError as error:
        raise ConfigError(f"{path} cannot compute rewards: {error}; turn it off in its own config.json") from None
    if layout.packed:
        use_tree_attention(model)
    try:
        yield replace(
            policy,
            model=model,
            computer=replace(policy.computer, base=model if layout.fused_head else None),
            collator=replace(policy.collator, packed=layout.packed),
        )
    finally:
        model.to("meta")  # frees the memory even if there are still references to the model

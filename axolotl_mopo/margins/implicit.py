"""Log-probs of the rows' completions under a model: the reference's, and those that implicit rewards are made of."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, tqdm
from datasets import Dataset
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from axolotl_mopo.data.collating import PairCollator, read_tokens
from axolotl_mopo.engine.layout import accept_trees
from axolotl_mopo.engine.scoring import score

_NAME = "margin"


@torch.no_grad()
def completion_logps(
    model: nn.Module, rows: Dataset, collator: PairCollator, accelerator: Accelerator, batch_size: int, title: str
) -> Tensor:
    """Log-probs [N, 2] of the chosen and the rejected completions of N rows, without dropout, in float32.

    Args:
        model: as it is run, possibly wrapped.
        rows: prepared rows.
        collator: makes their batches.
        accelerator: gives device and precision.
        batch_size: rows at a time.
        title: of the progress bar.
    """
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collator)
    was_training = model.training
    model.eval()
    logps = []
    for batch in tqdm(loader, desc=title, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            logps.append(score(model, send_to_device(batch, accelerator.device)).logps.view(-1, 2).float())
    model.train(was_training)
    return torch.cat(logps)


def without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """The base model alone, where the model has adapters."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


@contextmanager
def with_adapter(model: nn.Module, path: str) -> Iterator[None]:
    """Run the model with the adapter at `path` in the place of its own, and leave it as it was, gradients included.

    Nothing but the adapter's own weights is loaded.

    Args:
        model: not wrapped; with or without adapters.
        path: the adapter's folder.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    was_training = model.training
    if isinstance(model, PeftModel):
        active = model.active_adapter
        model.load_adapter(path, _NAME, is_trainable=False)
        model.set_adapter(_NAME, inference_mode=True)
    else:
        attached = PeftModel.from_pretrained(model, path, adapter_name=_NAME, is_trainable=False)
    try:
        yield
    finally:
        if isinstance(model, PeftModel):
            model.set_adapter(active, inference_mode=True)
            model.delete_adapter(_NAME)
            _unwrap_untouched(model)
        else:
            attached.unload()
        model.train(was_training)
        after = dict(model.named_parameters())
        if after.keys() != before.keys():
            raise RuntimeError(f"the adapter {path} left {sorted(after.keys() ^ before.keys())} in the policy")
        for name, parameter in after.items():
            parameter.requires_grad_(before[name])


def _unwrap_untouched(model: nn.Module) -> None:
    """Take off the wrappers that PEFT leaves on modules that the deleted adapter alone had changed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and not any(getattr(module, part) for part in module.adapter_layer_names):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())


@contextmanager
def separate_model(path: str, like: PreTrainedModel, rows: Dataset, device: torch.device) -> Iterator[tuple]:
    """A whole model of its own, loaded for a while, in the policy's precision.

    Args:
        path: a folder or a model of the hub.
        like: the policy, whose type and attention it gets.
        rows: prepared rows, one of which tries the layout.
        device: where it goes.

    Yields:
        The model and the collator that makes its batches.
    """
    attention = (like.config._attn_implementation or "sdpa").removeprefix("mopo_tree_")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=like.dtype, attn_implementation=attention)
    model.to(device)
    if model.config.vocab_size != like.config.vocab_size:
        raise ValueError(
            f"{path} has a vocabulary of {model.config.vocab_size} tokens and the policy one of "
            f"{like.config.vocab_size}; an implicit reward needs the policy's own tokenizer"
        )
    reason = accept_trees(model, model, read_tokens(rows[0]))
    try:
        yield model, PairCollator(pad_token_id=model.config.pad_token_id or 0, packed=reason is None)
    finally:
        model.to("meta")  # frees the memory, whoever still refers to the model

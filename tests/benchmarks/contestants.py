"""The steps that are compared: ours, the papers' and TRL's, each on the same model and the same pairs."""

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from axolotl.core.training_args import AxolotlTrainingArguments
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from axolotl_mopo.logprobs.trees import Pair
from axolotl_mopo.plugin import MOPOTrainingArgs
from axolotl_mopo.training.amopo import AMoPOTrainer
from axolotl_mopo.training.base import MultiObjectiveTrainer
from axolotl_mopo.training.modpo import MODPOTrainer

from .naive import amopo_step, modpo_step, pad_rows

_TOKENIZER = Path(__file__).parents[2] / "example_configs" / "smoke" / "model"


@dataclass
class Contestant:
    """A way to compute the loss of one micro-batch."""

    name: str
    loss: Callable[[], Tensor]
    tokens: int
    """Tokens that the model runs on, padding and repetitions included."""


@dataclass
class _Arguments(MOPOTrainingArgs, AxolotlTrainingArguments):
    """What the host hands our trainers."""


def our_trainer(model: Any, pairs: Sequence[Pair], method: str, block: dict[str, Any]) -> Any:
    """The trainer of a method, as its block configures it, on these pairs."""
    rows = Dataset.from_list(
        [
            {
                "prompt_input_ids": pair.prompts,
                "chosen_input_ids": pair.chosen,
                "rejected_input_ids": pair.rejected,
                "prompt_key": number,
                "cut_prompt_tokens": 0,
                "cut_completion_tokens": 0,
            }
            for number, pair in enumerate(pairs)
        ]
    )
    trainer: type[MultiObjectiveTrainer] = MODPOTrainer if method == "modpo" else AMoPOTrainer
    args = _Arguments(
        output_dir=tempfile.mkdtemp(), report_to="none", per_device_train_batch_size=len(pairs), bf16=False, mopo=block
    )
    return trainer(model, args=args, train_dataset=rows, processing_class=_tokenizer())


def cache_seconds(model: Any, pairs: Sequence[Pair], device: str) -> tuple[float, float]:
    """Seconds in which MODPO's reference and an adapter's margin are computed, and the naive step's forward passes."""
    folder = tempfile.mkdtemp()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(copy.deepcopy(base), config).save_pretrained(folder)
    block = {
        "objective": "better",
        "weights": {"better": 0.5, "safer": 0.5},
        "margins": {"safer": {"source": "adapter", "path": folder, "beta": 0.1}},
        "cache_dir": tempfile.mkdtemp(),
    }
    trainer, batch = our_trainer(model, pairs, "modpo", block), pad_rows(pairs, device)
    return _seconds(lambda: trainer.precompute(model)), _seconds(lambda: modpo_step(model, batch))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ours(model: Any, pairs: Sequence[Pair], method: str, device: str, *, layout: str) -> Contestant:
    """Our trainer's own loss; MODPO's constants are computed before."""
    if method == "amopo":
        names = [f"dimension {number}" for number in range(1, len(pairs[0].prompts))]
        block: dict[str, Any] = {"dimensions": names, "layout": layout}
    else:
        block = {"objective": "better", "weights": {"better": 1.0}, "cache_dir": tempfile.mkdtemp(), "layout": layout}
    trainer = our_trainer(model, pairs, method, block)
    if method == "modpo":
        trainer.precompute(model)
    model.train()
    batch = send_to_device(trainer.data_collator(list(trainer.train_dataset)), device)
    tokens = sum(one["input_ids"].numel() for unit in batch["groups"] for one in unit)
    return Contestant(f"ours, {layout}", lambda: trainer.compute_loss(model, batch), tokens)


def _naive(model: Any, pairs: Sequence[Pair], method: str, device: str) -> Contestant:
    """The papers' released code, in our wording."""
    batch = pad_rows(pairs, device)
    if method == "amopo":
        dimensions = len(pairs[0].prompts)
        return Contestant("naive", lambda: amopo_step(model, batch, dimensions), batch["input_ids"].numel())
    return Contestant("naive", lambda: modpo_step(model, batch), 4 * batch["input_ids"].numel())


def _trl(model: Any, pairs: Sequence[Pair], method: str, device: str) -> Contestant:
    """TRL's nearest trainer: DPO with its online reference, or CPO's SimPO on all 2 * D sequences of a pair."""
    common = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "bf16": False, "max_length": None}
    common["gradient_checkpointing"] = False  # the model has it where it was asked for
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    data = {"train_dataset": rows, "processing_class": _tokenizer()}
    if method == "modpo":
        # With adapters TRL takes the model without them as the reference.
        reference = None if isinstance(model, PeftModel) else copy.deepcopy(model).eval()
        trainer: Any = DPOTrainer(model, reference, args=DPOConfig(**common), **data)
        features = [
            {"prompt_ids": pair.prompts[0], "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs
        ]
    else:
        config = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=2.0, beta=0.8)
        trainer = CPOTrainer(model, args=config, **data)
        features = [_cpo_features(prompt, pair) for pair in pairs for prompt in pair.prompts]
    model.train()
    batch = send_to_device(trainer.data_collator(features), device)
    sides = [batch[name] for name in ("input_ids", "chosen_input_ids", "rejected_input_ids") if name in batch]
    width = max(side.shape[1] for side in sides)
    tokens = sum(side.shape[0] for side in sides) * width
    name = "TRL DPO" if method == "modpo" else "TRL CPO (SimPO)"
    return Contestant(name, lambda: trainer.compute_loss(model, batch), tokens * (2 if method == "modpo" else 1))


def _cpo_features(prompt: list[int], pair: Pair) -> dict[str, list[int]]:
    features = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        features[f"{side}_input_ids"] = [*prompt, *completion]
        features[f"{side}_attention_mask"] = [1] * (len(prompt) + len(completion))
        features[f"{side}_labels"] = [-100] * len(prompt) + list(completion)
    return features


def _tokenizer() -> Any:
    """Any tokenizer: the pairs are token ids already."""
    return AutoTokenizer.from_pretrained(_TOKENIZER)


STEPS: dict[str, Callable[[Any, Sequence[Pair], str, str], Contestant]] = {
    "naive": _naive,
    "trl": _trl,
    "padded": partial(_ours, layout="padded"),
    "packed": partial(_ours, layout="packed"),
}
"""Model, pairs, method and device -> a step."""

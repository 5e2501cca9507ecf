"""The closed world's policies, each trained by the real `axolotl train`."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .world import OBJECTIVES, read_policy, write_demonstrations, write_pairs

ROOT = Path(__file__).parents[2]
BETA = 0.5
_AXOLOTL = Path(sys.executable).parent / "axolotl"
_TINY = ROOT / "example_configs" / "smoke" / "model"
_COMMON = {
    "sequence_len": 64,
    # More than there are rows: every step sees all of them, so that no noise of sampling is left.
    "micro_batch_size": 8192,
    "gradient_accumulation_steps": 1,
    "lr_scheduler": "linear",
    "optimizer": "adamw_torch",
    "weight_decay": 0.0,
    "bf16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "save_strategy": "no",
    "logging_steps": 50,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
}


@dataclass(frozen=True)
class Run:
    """One policy to train: what differs from the common configuration."""

    name: str
    keys: Mapping[str, Any]


def modpo_run(name: str, objective: str, weights: Mapping[str, float], **margin: Any) -> Run:
    """MODPO on the pairs of one objective; the other objectives are true rewards, or `margin` says what they are."""
    margins = {other: margin or {"source": "column"} for other in weights if other != objective}
    block = {"objective": objective, "weights": dict(weights), "beta": BETA, "margins": margins}
    return Run(name, {"modpo": block, "datasets": [_pairs(f"{objective}-1.jsonl")]})


def dpo_run(name: str, parts: Mapping[str, int]) -> Run:
    """DPO on the pairs of several objectives, each with so many parts of the loss."""
    (first, *_) = parts
    block = {"objective": first, "weights": {first: 1.0}, "beta": BETA}
    datasets = [_pairs(f"{objective}-{count}.jsonl") for objective, count in parts.items()]
    return Run(name, {"modpo": block, "datasets": datasets})


def run_command(command: Sequence[Any], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


@dataclass
class World:
    """A folder with the world's data, its reference and the policies trained in it; `run` runs its commands."""

    folder: Path
    run: Callable[..., subprocess.CompletedProcess[str]] = run_command

    def fit_reference(self, seed: int = 0) -> None:
        """Write the data and fit a tiny Llama, whose weights are drawn from the seed, to the demonstrations."""
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(_TINY)).save_pretrained(self.folder / "start")
        AutoTokenizer.from_pretrained(_TINY).save_pretrained(self.folder / "start")
        write_demonstrations(self.folder / "demonstrations.jsonl")
        for objective in OBJECTIVES:
            for repeat in (1, 3, 7, 9):
                write_pairs(self.folder / f"{objective}-{repeat}.jsonl", objective, repeat)
        self._axolotl(
            {
                **_COMMON,
                "base_model": "start",
                "datasets": [{"path": "demonstrations.jsonl", "ds_type": "json", "type": "chat_template"}],
                "dataset_prepared_path": "prepared",
                "output_dir": "reference",
                "micro_batch_size": 64,
                "max_steps": 400,
                "learning_rate": 0.003,
            }
        )

    def train(self, runs: Sequence[Run], steps: int = 300) -> None:
        """Train LoRA adapters of the reference, all in one sweep."""
        common = {
            **_COMMON,
            "base_model": "reference",
            "plugins": ["axolotl_mopo.MOPOPlugin"],
            "rl": "modpo",
            "modpo": {},
            "dataset_prepared_path": "prepared",
            "adapter": "lora",
            "lora_r": 16,
            "lora_alpha": 64,
            "lora_target_linear": True,
            "max_steps": steps,
            "learning_rate": 0.004,
            "adam_beta2": 0.9,
        }
        # A list under "_" holds the keys that go together.
        self._axolotl(common, {"_": [{"output_dir": f"runs/{run.name}", **run.keys} for run in runs]})

    def adapter(self, name: str) -> Path:
        """The folder of a run's adapter, relative to the world's."""
        (path,) = (self.folder / "runs" / name).glob("sweep*")
        return path.relative_to(self.folder)

    def reference(self) -> PreTrainedModel:
        """The policy that all runs start from."""
        return AutoModelForCausalLM.from_pretrained(self.folder / "reference")

    def read(self, *adapters: tuple[str, float]) -> tuple[Tensor, float]:
        """`read_policy` of the reference with the weighted sum of the updates of some runs."""
        model: Any = self.reference()
        if adapters:
            (first, *others), weights = zip(*adapters, strict=True)
            model = PeftModel.from_pretrained(model, self.folder / self.adapter(first), adapter_name="0")
            for number, name in enumerate(others, start=1):
                model.load_adapter(self.folder / self.adapter(name), str(number))
            names = [str(number) for number in range(len(adapters))]
            model.add_weighted_adapter(names, list(weights), "soup", combination_type="cat")
            model.set_adapter("soup")
        return read_policy(model, AutoTokenizer.from_pretrained(self.folder / "reference"))

    def _axolotl(self, cfg: Mapping[str, Any], sweep: Mapping[str, Any] | None = None) -> None:
        arguments = ["config.yaml", "--launcher", "python"]
        (self.folder / "config.yaml").write_text(yaml.safe_dump(dict(cfg)), encoding="utf-8")
        if sweep:
            (self.folder / "sweep.yaml").write_text(yaml.safe_dump(dict(sweep)), encoding="utf-8")
            arguments += ["--sweep", "sweep.yaml"]
        env = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = self.run([_AXOLOTL, "train", *arguments], cwd=self.folder, env=env)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-5000:])


def _pairs(path: str) -> dict[str, Any]:
    return {"path": path, "ds_type": "json", "type": "axolotl_mopo.pairs"}

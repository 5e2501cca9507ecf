"""`mopo.json`, which stands beside every checkpoint: what a model was trained for, and how to ask it."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_mopo.config import DimensionsConfig, MethodConfig
from axolotl_mopo.config.directives import user_template
from axolotl_mopo.config.model_files import MANIFEST
from axolotl_mopo.files import Folder

_PACKAGES = ("axolotl-mopo", "axolotl", "torch", "transformers", "trl", "peft")


def manifest(block: MethodConfig, base_model: str) -> dict[str, Any]:
    """The method's settings, the versions, and for AMoPO what the user's turn says to each of its prompts.

    `inference` holds a template for every name; put the question in the place of `{question}`. The dimensions' ask for
    the best score.
    """
    content: dict[str, Any] = {"method": block.rl, "base_model": base_model, **block.model_dump(mode="json")}
    if isinstance(block, DimensionsConfig):
        content["inference"] = {
            name: user_template(block.inference_directive(name if name in block.dimensions else None))
            for name in block.prompt_names
        }
    return content | {"versions": {package: version(package) for package in _PACKAGES}}


def write_manifest(block: MethodConfig, base_model: str, folder: Path) -> None:
    """Write `mopo.json` into a folder."""
    text = json.dumps(manifest(block, base_model), indent=2, ensure_ascii=False)
    Folder(folder).write(MANIFEST, (text + "\n").encode())


class ManifestCallback(TrainerCallback):
    """Writes the manifest beside every checkpoint."""

    def __init__(self, block: MethodConfig, base_model: str) -> None:
        self.block, self.base_model = block, base_model

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The host's checkpoint is complete."""
        if state.is_world_process_zero:
            write_manifest(self.block, self.base_model, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

"""The files beside every checkpoint, and what writes them.

`mopo.json` says what a model was trained for and how to ask it, and `mopo.png` shows the run. `modpo_start.json` says
what MODPO's policy was when the run started: the digests of the base model's and of the initial policy's weights
(`base`, `initial`), and their `dtype`. Tables of log-probs are named after these, so a resumed run finds them, although
its policy has other weights by then.
"""

import gc
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from axolotl.utils.logging import get_logger
from pydantic import ConfigDict
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_mopo.config import MethodConfig, PromptSettings
from axolotl_mopo.config.directives import user_template
from axolotl_mopo.config.model_files import MANIFEST
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.files import Folder
from axolotl_mopo.records import Record, read_record
from axolotl_mopo.training.history import draw

LOG = get_logger("axolotl.mopo")

PICTURE = "mopo.png"
START = "modpo_start.json"

_PACKAGES = ("axolotl-mopo", "axolotl", "torch", "transformers", "trl", "peft")


def manifest(block: MethodConfig, base_model: str) -> dict[str, Any]:
    """The method's settings, the versions, and for AMoPO what the user's turn says to each of its prompts.

    `inference` holds a template for every name; put the question in the place of `{question}`. The dimensions' ask for
    the best score.
    """
    content: dict[str, Any] = {"method": block.rl, "base_model": base_model, **block.model_dump(mode="json")}
    if isinstance(block, PromptSettings):
        content["inference"] = {
            name: user_template(block.inference_directive(name if name in block.dimensions else None))
            for name in block.prompt_names
        }
    return content | {"versions": {package: version(package) for package in _PACKAGES}}


def write_manifest(block: MethodConfig, base_model: str, folder: Path) -> None:
    """Write `mopo.json` into a folder."""
    text = json.dumps(manifest(block, base_model), indent=2, ensure_ascii=False)
    Folder(folder).write(MANIFEST, (text + "\n").encode())


class _Start(Record):
    """What the file holds."""

    model_config = ConfigDict(extra="forbid")

    base: str
    initial: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"]


def read_start(checkpoint: Path) -> dict[str, str] | None:
    """What the file beside a checkpoint holds, or None without one.

    Raises:
        ConfigError: where the file holds something else; naming file and key.
    """
    path = checkpoint / START
    if not path.exists():
        return None
    try:
        return read_record(_Start, path).model_dump()
    except OSError as error:
        raise ConfigError(str(error)) from None


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


class ManifestCallback(TrainerCallback):
    """Writes the manifest beside every checkpoint."""

    def __init__(self, block: MethodConfig, base_model: str) -> None:
        self.block, self.base_model = block, base_model

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The checkpoint is complete."""
        if state.is_world_process_zero:
            write_manifest(self.block, self.base_model, _checkpoint(args, state))


class StartCallback(TrainerCallback):
    """Writes the file beside every checkpoint.

    Args:
        trainer: whose `start` is written.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The checkpoint is complete."""
        if state.is_world_process_zero:
            text = json.dumps(self.trainer.start, indent=2) + "\n"
            Folder(_checkpoint(args, state)).write(START, text.encode())


class HistoryCallback(TrainerCallback):
    """Draws the picture beside every checkpoint, and beside the final model."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The checkpoint is complete."""
        self._draw(state, _checkpoint(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """All steps are made."""
        self._draw(state, Path(str(args.output_dir)))

    @staticmethod
    def _draw(state: TrainerState, folder: Path) -> None:
        if state.is_world_process_zero:
            try:
                if picture := draw(state.log_history):
                    Folder(folder).write(PICTURE, picture)
            except Exception as error:  # a picture is not worth a run
                LOG.warning("%s could not be drawn: %r", folder / PICTURE, error)
            gc.collect()  # a figure is a web of cycles that keeps its pixels

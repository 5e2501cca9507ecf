"""Callbacks that write a file next to every checkpoint.

`mopo.json` records the settings of the method, the variables of the chat template and the prompts for inference.
`mopo.png` plots the run. `modpo_start.json` records MODPO's policy at the start of the run: the digests of the base
model's and of the initial policy's weights (`base`, `initial`), and their `dtype`. The names of cached log-prob tables
are made from these, so a resumed run finds the tables although its policy has other weights.
"""

import gc
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from axolotl.utils.logging import get_logger
from pydantic import ConfigDict
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_mopo.config import MethodConfig, PromptSettings
from axolotl_mopo.config.directives import turn_template
from axolotl_mopo.config.model_files import MANIFEST
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.files import Folder
from axolotl_mopo.records import Record, read_record
from axolotl_mopo.training.history import draw

LOG = get_logger("axolotl.mopo")

PICTURE = "mopo.png"
START = "modpo_start.json"

_PACKAGES = ("axolotl-mopo", "axolotl", "torch", "transformers", "trl", "peft")


def manifest(
    block: MethodConfig, base_model: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of `mopo.json`: the method's settings and versions, and for AMoPO templates for inference.

    It has `chat_template_kwargs` if the run sets variables of the chat template.

    `inference` has a template of the turn with the directive for every prompt; replace `{question}` in it by the
    question, or `{system}` by the system message. The templates of dimensions request the best score.
    """
    content: dict[str, Any] = {"method": block.rl, "base_model": base_model, **block.model_dump(mode="json")}
    if chat_template_kwargs:
        content["chat_template_kwargs"] = dict(chat_template_kwargs)
    if isinstance(block, PromptSettings):
        content["inference"] = {
            name: turn_template(block.inference_directive(name if name in block.dimensions else None))
            for name in block.prompt_names
        }
    return content | {"versions": {package: version(package) for package in _PACKAGES}}


def write_manifest(
    block: MethodConfig, base_model: str, folder: Path, chat_template_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Write `mopo.json` into a folder."""
    text = json.dumps(manifest(block, base_model, chat_template_kwargs), indent=2, ensure_ascii=False)
    Folder(folder).write(MANIFEST, (text + "\n").encode())


class _Start(Record):
    """Content of `modpo_start.json`."""

    model_config = ConfigDict(extra="forbid")

    base: str
    initial: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"]


def read_start(checkpoint: Path) -> dict[str, str] | None:
    """Read `modpo_start.json` of a checkpoint; None if there is none.

    Raises:
        ConfigError: if the file cannot be read or is not valid; names the file and the key.
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
    """Writes `mopo.json` next to every checkpoint."""

    def __init__(
        self, block: MethodConfig, base_model: str, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.block, self.base_model, self.chat_template_kwargs = block, base_model, chat_template_kwargs

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called after a checkpoint is saved."""
        if state.is_world_process_zero:
            write_manifest(self.block, self.base_model, _checkpoint(args, state), self.chat_template_kwargs)


class StartCallback(TrainerCallback):
    """Writes `modpo_start.json` next to every checkpoint.

    Args:
        trainer: the trainer; its `start` is written.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called after a checkpoint is saved."""
        if state.is_world_process_zero:
            text = json.dumps(self.trainer.start, indent=2) + "\n"
            Folder(_checkpoint(args, state)).write(START, text.encode())


class HistoryCallback(TrainerCallback):
    """Writes `mopo.png` next to every checkpoint and next to the final model."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called after a checkpoint is saved."""
        self._draw(state, _checkpoint(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called at the end of training."""
        self._draw(state, Path(str(args.output_dir)))

    @staticmethod
    def _draw(state: TrainerState, folder: Path) -> None:
        if state.is_world_process_zero:
            try:
                if picture := draw(state.log_history):
                    Folder(folder).write(PICTURE, picture)
            except Exception as error:  # a failed plot must not stop the run
                LOG.warning("%s could not be written: %r", folder / PICTURE, error)
            gc.collect()  # a figure has reference cycles, which keep its memory

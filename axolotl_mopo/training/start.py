"""`modpo_start.json`, beside every checkpoint of MODPO: what the policy was when the run started.

It holds the names of the base model's and of the initial policy's weights (`base`, `initial`), and their `dtype`.
Tables of log-probs are named after these, so a resumed run finds them, although its policy has other weights by then.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.files import Folder
from axolotl_mopo.records import Record, read_record

FILE_NAME = "modpo_start.json"


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
    path = checkpoint / FILE_NAME
    if not path.exists():
        return None
    try:
        return read_record(_Start, path).model_dump()
    except OSError as error:
        raise ConfigError(str(error)) from None


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
            Folder(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}").write(FILE_NAME, text.encode())

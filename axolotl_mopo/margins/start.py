"""`modpo_start.json`, beside every checkpoint of MODPO: which weights the run started from.

Tables of reference log-probs are named after these weights. A resumed run finds its tables by them, although the
weights themselves are gone by then.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE_NAME = "modpo_start.json"


def read_start(checkpoint: Path) -> dict[str, str] | None:
    """The names of the base model's and the initial policy's weights (`base`, `initial`), or None without the file.

    Raises:
        ValueError: where the file holds something else.
    """
    path = checkpoint / FILE_NAME
    if not path.exists():
        return None
    try:
        start = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(start, dict) or {name: type(start[name]) for name in start} != {"base": str, "initial": str}:
        raise ValueError(f"{path} must hold two strings, base and initial")
    return start


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
            path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE_NAME
            path.write_text(json.dumps(self.trainer.start, indent=2) + "\n", encoding="utf-8")

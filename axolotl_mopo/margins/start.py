"""`modpo_start.json`, beside every checkpoint of MODPO: what the policy was when the run started.

It holds the names of the base model's and of the initial policy's weights (`base`, `initial`), and their `dtype`.
Tables of log-probs are named after these, so a resumed run finds them, although its policy has other weights by then.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE_NAME = "modpo_start.json"
_KEYS = ("base", "initial", "dtype")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def read_start(checkpoint: Path) -> dict[str, str] | None:
    """What the file beside a checkpoint holds, or None without one.

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
    if not isinstance(start, dict) or {name: type(start[name]) for name in start} != dict.fromkeys(_KEYS, str):
        raise ValueError(f"{path} must hold the strings {', '.join(_KEYS)} and nothing else")
    if start["dtype"] not in _DTYPES:
        raise ValueError(f"`dtype` in {path} is {start['dtype']!r}; it must be one of {', '.join(_DTYPES)}")
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

"""A long run of each method, watched: `python -m tests.benchmarks.soak [--steps 2000]`.

Trains the smoke configurations by the real `axolotl train` on a CPU, with checkpoints and evaluation, and prints how
memory, open files and speed go: the resident memory's growth after step 200, the most open files before and after it,
and the time of the last 200 steps beside that of the first 200 (the median step, so that evaluation does not count).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

ROOT = Path(__file__).parents[2]
METHODS = ("amopo", "modpo")
WARM = 200
"""Steps after which everything that is allocated once should be there."""


class Watcher(TrainerCallback):
    """Notes time, resident memory and open files at the end of every step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Take the time."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Write a line."""
        seconds = time.perf_counter() - self.started
        (resident,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        noted = {
            "seconds": seconds,
            "kib": int(resident.split()[1]),
            "files": len(list(Path("/proc/self/fd").iterdir())),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(noted) + "\n")


class WatchingPlugin(BasePlugin):
    """Adds the watcher to a run."""

    def add_callbacks_pre_trainer(self, cfg, model):
        """The watcher, which writes into the output's folder."""
        return [Watcher(Path(cfg.output_dir).with_suffix(".jsonl"))]


def run(method: str, steps: int, folder: Path) -> list[dict]:
    """Train; what was noted of every step."""
    cfg = yaml.safe_load((ROOT / "example_configs" / f"smoke-{method}.yaml").read_text(encoding="utf-8"))
    for key in ("evals_per_epoch", "saves_per_epoch", "num_epochs"):
        cfg.pop(key, None)
    cfg |= {
        "plugins": ["axolotl_mopo.MOPOPlugin", "tests.benchmarks.soak.WatchingPlugin"],
        "max_steps": steps,
        "eval_steps": 100,
        "save_steps": 100,
        "save_total_limit": 2,
        "output_dir": str(folder / method),
        "dataset_prepared_path": str(folder / "prepared"),
        "learning_rate": 0.0002,
    }
    (folder / f"{method}.yaml").write_text(yaml.safe_dump(cfg), encoding="utf-8")
    subprocess.run(
        [Path(sys.executable).parent / "axolotl", "train", folder / f"{method}.yaml", "--launcher", "python"],
        cwd=ROOT,
        env={
            **os.environ,
            "AXOLOTL_DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        check=True,
        capture_output=True,
    )
    return [json.loads(line) for line in (folder / f"{method}.jsonl").read_text(encoding="utf-8").splitlines()]


def report(method: str, noted: list[dict]) -> str:
    """A row of the table."""
    warm, end = noted[WARM:][:WARM], noted[-WARM:]
    early, late = (statistics.median(step["kib"] for step in part) / 1024 for part in (warm, end))
    first, last = (1000 * statistics.median(step["seconds"] for step in part) for part in (noted[:WARM], end))
    files = [max(step["files"] for step in part) for part in (noted[:WARM], noted[WARM:])]
    memory = f"{early:,.0f} to {late:,.0f} ({late / early - 1:+.2%})"
    speed = f"{first:.1f} to {last:.1f} ({last / first - 1:+.1%})"
    return f"| {method} | {len(noted):,} | {memory} | {files[0]} to {files[1]} | {speed} |"


def main() -> None:
    """Run both methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--method", choices=METHODS, action="append")
    arguments = parser.parse_args()
    print("| method | steps | resident MiB after step 200, at end | most open files | ms a step, first 200, last 200 |")
    print("| --- | --- | --- | --- | --- |")
    for method in arguments.method or METHODS:
        with tempfile.TemporaryDirectory() as folder:
            print(report(method, run(method, arguments.steps, Path(folder))), flush=True)


if __name__ == "__main__":
    main()

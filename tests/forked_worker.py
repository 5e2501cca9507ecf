"""Train configurations one after the other by the host's own train command, each in a fork of this process."""

import json
import os
import sys
import traceback
from pathlib import Path

# What every run needs is imported once; but not the host's trainers, which are made for the plugins of a run.
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import trl.trainer.dpo_trainer  # noqa: F401
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.utils.dict import DictDefault


def train(cfg, kill_at=None):
    """Train; at the event, count and signal in `kill_at` the process ends."""
    if kill_at is not None:
        os.environ["KILL_AT"] = json.dumps(kill_at)
    do_train(load_cfg(DictDefault(cfg)), TrainerCliArgs())


def main(jobs: str, statuses: str) -> None:
    """Do the jobs in a JSON file, each the arguments of `train`; how each process ended is written to `statuses`."""
    ended = []
    for job in json.loads(Path(jobs).read_text()):
        process = os.fork()
        if process == 0:
            try:
                train(**job)
            except SystemExit as left:
                os._exit(left.code or 0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    Path(statuses).write_text(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])

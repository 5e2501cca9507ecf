"""Train configurations by Axolotl's own train command with DeepSpeed or FSDP2, as one of several CPU processes.

What stands in for GPUs is named beside its line; the trainer, DeepSpeed, FSDP2 and what is saved are real. Every job
runs in a fork of its own, so that what all import is imported once.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import axolotl.train
import deepspeed.runtime.utils
import torch
import transformers.training_args
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.integrations.base import PluginManager
from axolotl.loaders.model import ModelLoader
from axolotl.utils.dict import DictDefault
from transformers import TrainerCallback

# accelerate offers no backend without an accelerator, and FSDP and DeepSpeed to a GPU's distributed types alone.
if int(os.environ["WORLD_SIZE"]) > 1:
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # a CPU computes in bf16 too
build_mesh = ParallelismConfig.build_device_mesh
ParallelismConfig.build_device_mesh = lambda self, kind: build_mesh(self, "cpu")  # Axolotl asks for one of "cuda"
gather = deepspeed.runtime.utils.all_gather_into_tensor_dp_groups  # gloo gathers by copies, which autograd refuses
deepspeed.runtime.utils.all_gather_into_tensor_dp_groups = torch.no_grad()(gather)
set_device_map = ModelLoader._set_device_map_config


def set_device_map_of_cpu(self):
    """Axolotl puts the model of each rank on the GPU of its number."""
    self.cfg.device_map = {"": "cpu"}
    set_device_map(self)


ModelLoader._set_device_map_config = set_device_map_of_cpu


class Killer(TrainerCallback):
    """Ends the process, as a kill does, once the checkpoint of a step is complete on all ranks."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            torch.distributed.barrier()
            os._exit(0)


def train(cfg, result, environment, kill_at=None):
    """Train, and write on the main process the log, MODPO's constants and what the run said.

    Args:
        cfg: as the user gives it.
        result: the file.
        environment: what the launcher sets.
        kill_at: the step after whose checkpoint the run is killed.
    """
    os.environ.update(environment)
    trainers = []
    setup = axolotl.train.setup_model_and_trainer

    def setup_and_keep(*args):
        made = setup(*args)
        trainers.append(made[0])
        if kill_at is not None:
            made[0].add_callback(Killer(kill_at))
        return made

    axolotl.train.setup_model_and_trainer = setup_and_keep
    do_train(load_cfg(DictDefault(cfg)), TrainerCliArgs())
    (trainer,) = trainers
    if os.environ["RANK"] == "0":
        constants = {name: tuple(tables) for name, tables in getattr(trainer, "_constants", {}).items()}
        torch.save({"log": trainer.state.log_history, "constants": constants}, result)


def main(jobs):
    """Do the jobs in a JSON file, each the arguments of `train`; what a job says goes beside its result."""
    PluginManager.get_instance().register("axolotl_mopo.MOPOPlugin")
    import axolotl.core.builders  # noqa: F401 (made for the plugins of a run, which are the same for all jobs)

    import axolotl_mopo.training.amopo
    import axolotl_mopo.training.modpo  # noqa: F401

    for job in json.loads(Path(jobs).read_text()):
        said = f"{job['result']}.log{os.environ['RANK']}"
        process = os.fork()
        if process == 0:
            with Path(said).open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            try:
                train(**job)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        _, status = os.waitpid(process, 0)
        Path(f"{job['result']}.exit{os.environ['RANK']}").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(*sys.argv[1:])

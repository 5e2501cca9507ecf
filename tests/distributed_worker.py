"""Train configurations in this process, one of several that talk by gloo, and write down what came of them."""

import json
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from conftest import Poison, host_trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, set_seed

from axolotl_mopo.errors import LossError
from axolotl_mopo.training.collator import PairCollator


@dataclass
class NotingCollator(PairCollator):
    """Notes how many pairs a batch has, and how many passes each of its groups."""

    pairs: int = 0
    groups: list = field(default_factory=list)

    def __call__(self, rows):
        batch = super().__call__(rows)
        self.pairs += batch["size"]
        self.groups.append([len(group) for group in batch["groups"]])
        return batch


class PairsBefore(TrainerCallback):
    """Notes how many pairs went through the model before the first step."""

    def __init__(self, collator):
        self.collator, self.pairs = collator, None

    def on_train_begin(self, *args, **kwargs):
        self.pairs = self.collator.pairs


def train(cfg, result, sharded=False, poison=None):
    """Train a configuration.

    Args:
        cfg: as the user gives it.
        result: what rank 0 writes: the log, the parameters that were trained, and MODPO's constants; every rank writes
            what it ran beside it, or why it stopped.
        sharded: whether FSDP2 splits the model; the weights are written to `result.model` and `result.shards` as well.
        poison: a token whose embedding is made infinite.
    """
    set_seed(cfg["seed"])
    trainer = host_trainer(cfg)
    collator = trainer.data_collator
    trainer.data_collator = noting = NotingCollator(collator.pad_token_id, collator.packed, collator.max_tokens)
    trainer.add_callback(before := PairsBefore(noting))
    if poison is not None:
        trainer.add_callback(Poison(poison))
    try:
        written = train_sharded(trainer, result) if sharded else trainer.train() and {}
    except LossError as error:
        Path(f"{result}.error{trainer.args.process_index}").write_text(str(error))
        return
    ran = {"groups": noting.groups, "before": before.pairs}
    Path(f"{result}.ran{trainer.args.process_index}").write_text(json.dumps(ran))
    if trainer.is_world_process_zero():
        if not sharded:
            written["parameters"] = {
                name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad
            }
        constants = {name: tuple(tables) for name, tables in getattr(trainer, "_constants", {}).items()}
        torch.save({"log": trainer.state.log_history, "constants": constants, **written}, result)


def train_sharded(trainer, result):
    """A short version of the Trainer's loop, on a model sharded by torch's FSDP2; on a CPU, accelerate shards none."""
    model = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mesh = init_device_mesh("cpu", (trainer.accelerator.num_processes,))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    trainer.create_optimizer_and_scheduler(trainer.args.max_steps)
    if trainer.method.rl == "modpo":
        trainer.precompute(model)
        trainer.check_start(model)
    trainer.current_gradient_accumulation_steps = 1
    losses = []
    for inputs in islice(trainer.get_train_dataloader(), trainer.args.max_steps):
        loss = trainer.training_step(model, inputs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        trainer.state.global_step += 1
        losses.append(trainer.accelerator.reduce(loss, "mean").item())
    eval_loss = trainer.evaluate()["eval_loss"]
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{result}.shards")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.is_world_process_zero():
        model.save_pretrained(f"{result}.model", state_dict=state)
    return {"losses": losses, "eval_loss": eval_loss}


def main(jobs: str) -> None:
    """Do the jobs in a JSON file, each the arguments of `train`."""
    for job in json.loads(Path(jobs).read_text()):
        train(**job)


if __name__ == "__main__":
    main(*sys.argv[1:])

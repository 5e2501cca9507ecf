"""Compute a run's constants and evaluate through a sharded policy, one of several processes under torchrun."""

import json
import sys
from pathlib import Path

import torch
from conftest import host_trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import set_seed


def main(config: str, result: str) -> None:
    """Shard the policy of the JSON configuration in `config`; rank 0 writes the constants to `result`."""
    cfg = json.loads(Path(config).read_text())
    set_seed(cfg["seed"])
    trainer = host_trainer(cfg)
    model = trainer.model
    mesh = init_device_mesh("cpu", (trainer.accelerator.num_processes,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    trainer.precompute(model)
    constants = {name: tuple(tables) for name, tables in trainer._constants.items()}
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save({"constants": constants, "eval_loss": metrics["eval_loss"]}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train a configuration in this process, one of several under torchrun, and write down what came of it."""

import json
import sys
from pathlib import Path

import torch
from conftest import host_trainer
from transformers import set_seed


def main(config: str, result: str) -> None:
    """Train the JSON configuration in the file `config`; rank 0 writes the log and the parameters to `result`."""
    cfg = json.loads(Path(config).read_text())
    set_seed(cfg["seed"])
    trainer = host_trainer(cfg)
    trainer.train()
    if trainer.is_world_process_zero():
        parameters = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save({"log": trainer.state.log_history, "parameters": parameters}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train a configuration in this process, one of several under torchrun, and write down what came of it."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import host_trainer
from transformers import set_seed

from axolotl_mopo.data.collating import PairCollator


@dataclass
class NotingCollator(PairCollator):
    """Notes how many passes each unit of a batch has."""

    units: list = field(default_factory=list)

    def __call__(self, rows):
        batch = super().__call__(rows)
        self.units.append([len(unit) for unit in batch["units"]])
        return batch


def main(config: str, result: str) -> None:
    """Train the JSON configuration in the file `config`.

    Rank 0 writes the log and the parameters to `result`, every rank its batches' units beside it.
    """
    cfg = json.loads(Path(config).read_text())
    set_seed(cfg["seed"])
    trainer = host_trainer(cfg)
    collator = trainer.data_collator
    trainer.data_collator = noting = NotingCollator(collator.pad_token_id, collator.packed, collator.max_tokens)
    trainer.train()
    Path(f"{result}.units{trainer.args.process_index}").write_text(json.dumps(noting.units))
    if trainer.is_world_process_zero():
        parameters = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save({"log": trainer.state.log_history, "parameters": parameters}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])

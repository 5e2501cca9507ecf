"""Prepared rows -> one batch on the CPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from axolotl_mopo.engine.trees import Pair, pack, pad


@dataclass
class PairCollator:
    """Collates rows into packed trees or padded rows, with the rows' numbers, `pair_index` [B], if they have some."""

    pad_token_id: int
    packed: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch of B pairs."""
        pairs = [read_tokens(row) for row in rows]
        batch = pack(pairs) if self.packed else pad(pairs, self.pad_token_id)
        if "pair_index" in rows[0]:
            batch["pair_index"] = torch.tensor([row["pair_index"] for row in rows])
        return batch


def read_tokens(row: Mapping[str, Any]) -> Pair:
    """The token ids of a prepared row."""
    return Pair(row["prompt_input_ids"], row["chosen_input_ids"], row["rejected_input_ids"])

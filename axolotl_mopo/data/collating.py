"""Prepared rows -> one batch on the CPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from axolotl_mopo.engine.trees import Pair, pack, pad

_NUMBERS = ("ref_chosen_logps", "ref_rejected_logps", "chosen_margins", "rejected_margins")


@dataclass
class PairCollator:
    """Collates rows into packed trees or padded rows, with the numbers that the rows hold besides token ids.

    Reference log-probs become tensors [B], margin rewards [B, J].
    """

    pad_token_id: int
    packed: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch of B pairs."""
        pairs = [read_tokens(row) for row in rows]
        batch = pack(pairs) if self.packed else pad(pairs, self.pad_token_id)
        numbers = {name: torch.tensor([row[name] for row in rows]) for name in _NUMBERS if name in rows[0]}
        return batch | numbers


def read_tokens(row: Mapping[str, Any]) -> Pair:
    """The token ids of a prepared row."""
    return Pair(row["prompt_input_ids"], row["chosen_input_ids"], row["rejected_input_ids"])

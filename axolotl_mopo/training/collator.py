"""Collates prepared rows into one batch on the CPU, whose tensors are in one buffer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from axolotl_mopo.logprobs.passes import lay_out, split_into_passes
from axolotl_mopo.logprobs.trees import Pair
from axolotl_mopo.training.one_buffer import OneBufferBatch


@dataclass
class PairCollator:
    """Collates B rows into `groups` of passes, `size` (B), and the numbers of the rows, `pair_index` [B], if any.

    A group is a list of passes: one pass over whole pairs, or all passes of one split pair.

    Args:
        pad_token_id: padding token of padded rows.
        packed: True for packed trees, False for padded rows.
        max_tokens: largest number of tokens in a pass, padding included; None for a single pass.
    """

    pad_token_id: int
    packed: bool = True
    max_tokens: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> OneBufferBatch:
        """Collate B rows."""
        pairs = [read_tokens(row) for row in rows]
        batch = OneBufferBatch(
            groups=[
                [lay_out(pairs, one, self.packed, self.pad_token_id) for one in group]
                for group in split_into_passes(pairs, self.max_tokens, self.packed)
            ],
            size=len(pairs),
        )
        if "pair_index" in rows[0]:
            batch["pair_index"] = torch.tensor([row["pair_index"] for row in rows])
        return batch


def read_tokens(row: Mapping[str, Any]) -> Pair:
    """Return the token ids of a prepared row; without spans, all tokens of its completions are scored."""
    spans = row.get("chosen_spans"), row.get("rejected_spans")
    return Pair(row["prompt_input_ids"], row["chosen_input_ids"], row["rejected_input_ids"], *spans)

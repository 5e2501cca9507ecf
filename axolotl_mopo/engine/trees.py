"""Token ids of preference pairs -> one batch that a causal model scores in a single forward pass.

`pack` lays every [prompt | chosen | rejected] tree of a micro-batch into one row without padding; `pad` gives each
prompt-completion sequence its own right-padded row, for models that cannot take trees. Both number the completions
alike: pair by pair, within a pair prompt by prompt, the chosen one before the rejected one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Token ids of one preference pair: D prompts that share both completions."""

    prompts: Sequence[list[int]]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Segments:
    """Which keys every query of a packed row sees: S runs of neighbouring queries, each with contiguous keys.

    The keys of a segment end with the segment's own tokens, so its attention is causal from the bottom right.
    """

    key_index: Tensor
    """Position in the row of every key, segment after segment, [K]."""
    cu_seq_q: Tensor
    """Where the queries of each segment begin, int32, [S + 1]."""
    cu_seq_k: Tensor
    """Where the keys of each segment begin, int32, [S + 1]."""
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]

    def to(self, device: Any, non_blocking: bool = False) -> "Segments":
        """A copy with its tensors on `device`."""
        return replace(
            self,
            key_index=self.key_index.to(device, non_blocking=non_blocking),
            cu_seq_q=self.cu_seq_q.to(device, non_blocking=non_blocking),
            cu_seq_k=self.cu_seq_k.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Segments":
        """A copy with its tensors in page-locked memory."""
        return replace(
            self,
            key_index=self.key_index.pin_memory(),
            cu_seq_q=self.cu_seq_q.pin_memory(),
            cu_seq_k=self.cu_seq_k.pin_memory(),
        )


def pack(pairs: Sequence[Pair]) -> dict[str, Any]:
    """All trees of a micro-batch in one row [1, T]; each prompt is computed once for both of its completions.

    Returns:
        The model's inputs (`input_ids`, `position_ids`, `attention_mask`, `segments`, `logits_to_keep`), `targets` [N]
        (the completions' tokens), `completion_ids` [N] (whose token it is, of C completions) and `lengths` [C].
    """
    input_ids: list[int] = []
    positions: list[int] = []
    keys: list[int] = []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    keep: list[int] = []
    for pair in pairs:
        for prompt in pair.prompts:
            start = len(input_ids)
            branch = start + len(prompt)
            rejected = branch + len(pair.chosen)
            end = rejected + len(pair.rejected)
            input_ids += [*prompt, *pair.chosen, *pair.rejected]
            positions += [*range(rejected - start), *range(len(prompt), len(prompt) + len(pair.rejected))]
            keys += [*range(start, rejected), *range(start, branch), *range(rejected, end)]
            query_lengths += [rejected - start, end - rejected]
            key_lengths += [rejected - start, branch - start + end - rejected]
            # The prompt's last position predicts the first token of both completions.
            keep += [*range(branch - 1, rejected - 1), branch - 1, *range(rejected, end - 1)]
    return {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([positions]),
        # transformers hands a 4-D mask on untouched, so none of size T x T is built; `segments` says who sees whom.
        "attention_mask": torch.zeros(1, 1, 1, 1),
        "segments": Segments(
            key_index=torch.tensor(keys),
            cu_seq_q=_boundaries(query_lengths),
            cu_seq_k=_boundaries(key_lengths),
            query_lengths=tuple(query_lengths),
            key_lengths=tuple(key_lengths),
        ),
        "logits_to_keep": torch.tensor(keep),
        **_targets(pairs),
    }


def pad(pairs: Sequence[Pair], pad_token_id: int) -> dict[str, Any]:
    """Every prompt-completion sequence in a row of its own, padded on the right to the longest [C, T].

    Returns:
        The model's inputs (`input_ids`, `attention_mask`, `logits_to_keep`, the range of positions in which any row has
        completion tokens [K]), `kept` [N] (which of the flattened [C * K] logits predict one), and `targets`,
        `completion_ids`, `lengths` as `pack` gives them.
    """
    sequences = [
        (prompt, completion) for pair in pairs for prompt in pair.prompts for completion in (pair.chosen, pair.rejected)
    ]
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    first = min(len(prompt) for prompt, _ in sequences) - 1
    input_ids = torch.full((len(sequences), width), pad_token_id)
    attention_mask = torch.zeros(len(sequences), width, dtype=torch.long)
    kept: list[int] = []
    for row, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        input_ids[row, :length] = torch.tensor([*prompt, *completion])
        attention_mask[row, :length] = 1
        offset = row * (width - 1 - first) + len(prompt) - 1 - first
        kept += range(offset, offset + len(completion))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "logits_to_keep": torch.arange(first, width - 1),
        "kept": torch.tensor(kept),
        **_targets(pairs),
    }


def _targets(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    completions = [c for pair in pairs for _ in pair.prompts for c in (pair.chosen, pair.rejected)]
    lengths = torch.tensor([len(completion) for completion in completions])
    return {
        "targets": torch.tensor(list(chain.from_iterable(completions))),
        "completion_ids": torch.arange(len(completions)).repeat_interleave(lengths),
        "lengths": lengths,
    }


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

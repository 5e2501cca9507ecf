"""Token ids of preference pairs -> one batch that a causal model scores in a single forward pass.

`pack` lays the trie of a micro-batch's sequences into one row without padding; `pad` gives each sequence its own
right-padded row, for models that cannot take trees. Both number the completions alike: pair by pair, within a pair
prompt by prompt, the chosen one before the rejected one.
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
    """All sequences of a micro-batch in one row [1, T], as a trie: a beginning that some of them share is there once.

    Shared are the prompt of both completions of a pair, but also the system's turn of its D prompts, and prompts and
    completions of pairs that stem from one group of responses.

    Returns:
        The model's inputs (`input_ids`, `position_ids`, `attention_mask`, `segments`, and `logits_to_keep`, the
        positions that predict a completion token [K]), and for the N completion tokens `targets` [N], `predictors` [N]
        (which of the K logits predict them), `completion_ids` [N] (whose token it is, of C completions) and `lengths`
        [C].
    """
    trie: dict[tuple[int, int], int] = {}  # (where the parent lies, token) -> where the token lies
    input_ids: list[int] = []
    positions: list[int] = []
    keys: list[int] = []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    predictors: list[int] = []
    for prompt, completion in _sequences(pairs):
        tokens, path, place = [*prompt, *completion], [], -1
        for token in tokens:
            place = trie.setdefault((place, token), len(trie))
            path.append(place)
        predictors += path[len(prompt) - 1 : -1]
        if new := len(trie) - len(input_ids):
            input_ids += tokens[-new:]
            positions += range(len(tokens) - new, len(tokens))
            keys += path
            query_lengths.append(new)
            key_lengths.append(len(tokens))
    kept, rows = torch.tensor(predictors).unique(return_inverse=True)
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
        "logits_to_keep": kept,
        "predictors": rows,
        **_targets(pairs),
    }


def pad(pairs: Sequence[Pair], pad_token_id: int) -> dict[str, Any]:
    """Every prompt-completion sequence in a row of its own, padded on the right to the longest [C, T].

    Returns:
        The model's inputs (`input_ids`, `attention_mask`, `logits_to_keep`, the range of positions in which any row has
        completion tokens [K]), `predictors` [N] (which of the flattened [C * K] logits predict them), and `targets`,
        `completion_ids`, `lengths` as `pack` gives them.
    """
    sequences = _sequences(pairs)
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    first = min(len(prompt) for prompt, _ in sequences) - 1
    input_ids = torch.full((len(sequences), width), pad_token_id)
    attention_mask = torch.zeros(len(sequences), width, dtype=torch.long)
    predictors: list[int] = []
    for row, (prompt, completion) in enumerate(sequences):
        length = len(prompt) + len(completion)
        input_ids[row, :length] = torch.tensor([*prompt, *completion])
        attention_mask[row, :length] = 1
        offset = row * (width - 1 - first) + len(prompt) - 1 - first
        predictors += range(offset, offset + len(completion))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "logits_to_keep": torch.arange(first, width - 1),
        "predictors": torch.tensor(predictors),
        **_targets(pairs),
    }


def _sequences(pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """Every prompt with each of its completions, in the order in which completions are numbered."""
    return [(prompt, side) for pair in pairs for prompt in pair.prompts for side in (pair.chosen, pair.rejected)]


def _targets(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    completions = [completion for _, completion in _sequences(pairs)]
    lengths = torch.tensor([len(completion) for completion in completions])
    return {
        "targets": torch.tensor(list(chain.from_iterable(completions))),
        "completion_ids": torch.arange(len(completions)).repeat_interleave(lengths),
        "lengths": lengths,
    }


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

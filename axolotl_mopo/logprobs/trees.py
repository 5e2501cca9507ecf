"""Turns token ids of preference pairs, or of single completions, into the inputs of one forward pass.

`pack` puts a trie of the micro-batch's sequences into one row without padding. `pad` gives each sequence its own
right-padded row, for models that do not support packed trees. Both number the completions in the same order: pair by
pair, within a pair prompt by prompt, the chosen one before the rejected one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tokens = NDArray[np.int64]


class Completion(NamedTuple):
    """Token ids of a prompt and its completion."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    spans: Sequence[int] | None = None
    """Start and end of each range of the completion that is scored; the model only reads the rest. None: all of it."""

    @property
    def completions(self) -> "list[Completion]":
        """A list of itself."""
        return [self]

    @property
    def scored(self) -> Tokens:
        """Positions of the scored tokens in prompt and completion."""
        spans = (0, len(self.tokens)) if self.spans is None else self.spans
        ranges = [np.arange(start, end) for start, end in zip(spans[::2], spans[1::2], strict=True)]
        return np.concatenate(ranges) + len(self.prompt)


class Pair(NamedTuple):
    """Token ids of one preference pair: D prompts that share both completions."""

    prompts: Sequence[Sequence[int]]
    chosen: Sequence[int]
    rejected: Sequence[int]
    chosen_spans: Sequence[int] | None = None
    """See `Completion.spans`."""
    rejected_spans: Sequence[int] | None = None

    @property
    def completions(self) -> list[Completion]:
        """All completions, prompt by prompt, the chosen one before the rejected one."""
        sides = (self.chosen, self.chosen_spans), (self.rejected, self.rejected_spans)
        return [Completion(prompt, *side) for prompt in self.prompts for side in sides]


class _Sequence(NamedTuple):
    """A prompt with a completion."""

    tokens: Tokens
    scored: Tokens
    """Positions of the tokens that are scored, at least one."""


@dataclass(frozen=True)
class Segments:
    """The keys that every query of a packed row attends to.

    There are S segments. A segment is a run of adjacent queries. Its keys are all tokens from the root of the trie to
    the end of the segment, so its attention mask is causal, aligned to the bottom right.
    """

    key_index: Tensor
    """Position in the row of every key, segment after segment, [K]."""
    cu_seq_q: Tensor
    """Cumulative numbers of queries, int32, [S + 1]."""
    cu_seq_k: Tensor
    """Cumulative numbers of keys, int32, [S + 1]."""
    max_q: int
    """Number of queries of the longest segment."""
    max_k: int
    """Number of keys of the longest segment."""
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]

    def to(self, device: Any, non_blocking: bool = False) -> "Segments":
        """Return a copy with its tensors on `device`."""
        return replace(
            self,
            key_index=self.key_index.to(device, non_blocking=non_blocking),
            cu_seq_q=self.cu_seq_q.to(device, non_blocking=non_blocking),
            cu_seq_k=self.cu_seq_k.to(device, non_blocking=non_blocking),
        )


def pack(items: Sequence[Pair | Completion]) -> dict[str, Any]:
    """Put all sequences of a micro-batch into one row [1, T] as a trie: each shared prefix is stored once.

    The completions of a pair share their prompt. The D prompts of a pair can share the system's turn. Pairs that come
    from one group of responses share prompts and completions.

    Returns:
        The model's inputs: `input_ids`, `position_ids`, `attention_mask`, `segments`, and `logits_to_keep`, the P
        positions that predict a scored token. Also `targets` [P, K], the tokens that each position predicts (more
        than one if completions branch there); and for the N scored tokens `predictors` [N], their indices in the
        flattened [P * K] log-probs, `completion_ids` [N], the index of their completion, and `lengths` [C], the
        number of scored tokens of each of C completions.
    """
    sequences = _sequences(items)
    input_ids, positions, keys = [], [], []
    paths: list[Tokens] = [np.empty(0, np.int64)] * len(sequences)  # position in the row of each token of a sequence
    size = 0
    for number, shared, previous in _in_order([sequence.tokens for sequence in sequences]):
        tokens = sequences[number].tokens
        inherited = paths[previous][:shared] if shared else paths[number][:0]
        paths[number] = np.concatenate([inherited, np.arange(size, size + len(tokens) - shared)])
        if shared < len(tokens):
            input_ids.append(tokens[shared:])
            positions.append(np.arange(shared, len(tokens)))
            keys.append(paths[number])
            size += len(tokens) - shared
    query_lengths = [len(part) for part in input_ids]
    key_lengths = [len(part) for part in keys]
    row = np.concatenate(input_ids)
    parents = np.concatenate([path[one.scored - 1] for one, path in zip(sequences, paths, strict=True)])
    children = np.concatenate([path[one.scored] for one, path in zip(sequences, paths, strict=True)])
    kept, targets, predictors = _branches(parents, children, row)
    return {
        "input_ids": torch.from_numpy(row)[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        # transformers passes a 4-D mask on unchanged, so it builds no mask of size T x T. Attention uses `segments`
        # instead. Only the load-balancing loss of a mixture of experts reads the mask: it weights each token by the
        # number of sequences that the token is in.
        "attention_mask": torch.from_numpy(np.bincount(np.concatenate(paths)))[None, None, None],
        "segments": Segments(
            key_index=torch.from_numpy(np.concatenate(keys)),
            cu_seq_q=_boundaries(query_lengths),
            cu_seq_k=_boundaries(key_lengths),
            max_q=max(query_lengths),
            max_k=max(key_lengths),
            query_lengths=tuple(query_lengths),
            key_lengths=tuple(key_lengths),
        ),
        "logits_to_keep": torch.from_numpy(kept),
        "targets": torch.from_numpy(targets),
        "predictors": torch.from_numpy(predictors),
        **_completions(sequences),
    }


def pad(items: Sequence[Pair | Completion], pad_token_id: int) -> dict[str, Any]:
    """Put every sequence of prompt and completion into its own row, padded on the right to the longest [C, T].

    Returns:
        The model's inputs: `input_ids`, `attention_mask`, and `logits_to_keep`, the range of L positions that predict
        a scored token in any row. Also `rows` [P], the indices in the flattened [C * L] positions of those that
        predict a scored token; `targets` [P, 1]; and `predictors`, `completion_ids`, `lengths` as in `pack`.
    """
    sequences = _sequences(items)
    width = max(len(sequence.tokens) for sequence in sequences)
    first = min(sequence.scored[0] for sequence in sequences) - 1
    input_ids = np.full((len(sequences), width), pad_token_id)
    attention_mask = np.zeros_like(input_ids)
    for sequence, line, mask in zip(sequences, input_ids, attention_mask, strict=True):
        line[: len(sequence.tokens)] = sequence.tokens
        mask[: len(sequence.tokens)] = 1
    kept = width - 1 - first
    rows = [sequence.scored - 1 - first + number * kept for number, sequence in enumerate(sequences)]
    targets = np.concatenate([sequence.tokens[sequence.scored] for sequence in sequences])
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "logits_to_keep": torch.arange(first, width - 1),
        "rows": torch.from_numpy(np.concatenate(rows)),
        "targets": torch.from_numpy(targets)[:, None],
        "predictors": torch.arange(len(targets)),
        **_completions(sequences),
    }


def trie_size(pair: Pair) -> int:
    """Count the tokens of a packed row of this pair alone."""
    sequences = [sequence.tokens for sequence in _sequences([pair])]
    return sum(len(sequences[number]) - shared for number, shared, _ in _in_order(sequences))


def _sequences(items: Sequence[Pair | Completion]) -> list[_Sequence]:
    """Return the sequence of every completion, in order."""
    arrays: dict[int, Tokens] = {}  # a pair's prompts and completions are each used several times

    def array(tokens: Sequence[int]) -> Tokens:
        if id(tokens) not in arrays:
            arrays[id(tokens)] = np.asarray(tokens, np.int64)
        return arrays[id(tokens)]

    completions = [completion for item in items for completion in item.completions]
    return [_Sequence(np.concatenate([array(one.prompt), array(one.tokens)]), one.scored) for one in completions]


def _in_order(sequences: Sequence[Tokens]) -> Iterator[tuple[int, int, int]]:
    """Sort sequences lexicographically: (index, length of the prefix shared with the previous one, its index).

    In this order the previous sequence shares at least as long a prefix with a sequence as any earlier one.
    """
    # Big-endian bytes sort like the tokens.
    order = sorted(range(len(sequences)), key=[tokens.astype(">u4").tobytes() for tokens in sequences].__getitem__)
    previous = order[0]
    yield previous, 0, previous
    for number in order[1:]:
        length = min(len(sequences[previous]), len(sequences[number]))
        differs = sequences[previous][:length] != sequences[number][:length]
        yield number, int(differs.argmax()) if differs.any() else length, previous
        previous = number


def _branches(parents: Tokens, children: Tokens, row: Tokens) -> tuple[Tokens, Tokens, Tokens]:
    """Return positions that predict [P], the tokens that follow each [P, K], and each child's index in [P * K], [N]."""
    branches, first, branch_of = np.unique(children, return_index=True, return_inverse=True)
    kept, kept_of = np.unique(parents[first], return_inverse=True)
    by_parent = np.argsort(kept_of, kind="stable")
    slots = np.empty_like(kept_of)
    slots[by_parent] = np.arange(len(kept_of)) - np.searchsorted(kept_of[by_parent], kept_of[by_parent])
    targets = np.zeros((len(kept), slots.max() + 1), np.int64)
    targets[kept_of, slots] = row[branches]
    return kept, targets, (kept_of * targets.shape[1] + slots)[branch_of]


def _completions(sequences: Sequence[_Sequence]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(sequence.scored) for sequence in sequences])
    return {"completion_ids": torch.arange(len(sequences)).repeat_interleave(lengths), "lengths": lengths}


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

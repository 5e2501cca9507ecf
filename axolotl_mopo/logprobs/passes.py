"""Splits a micro-batch into forward passes of at most a number of tokens, with as many passes on every rank."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from axolotl_mopo.logprobs.trees import Pair, pack, pad, trie_size


class Pass(NamedTuple):
    """The part of a micro-batch that one forward pass computes."""

    pairs: list[int]
    """Indices of its pairs in the micro-batch."""
    prompts: tuple[int, int] | None = None
    """Range of prompts (end excluded) if it computes a part of a single pair; None for all prompts."""


def split_into_passes(pairs: Sequence[Pair], max_tokens: int | None, packed: bool) -> list[list[Pass]]:
    """Split pairs into few passes by first-fit decreasing bin packing.

    A pair that is too long for a pass is split between its prompts. A single prompt with its completions that is still
    too long gets a pass of its own.

    Args:
        pairs: the pairs of a micro-batch.
        max_tokens: largest number of tokens in a pass, padding included; None for a single pass.
        packed: True for packed trees, False for padded rows.

    Returns:
        Groups of passes: one pass of whole pairs, or all passes of a split pair.
    """
    if max_tokens is None:
        return [[Pass(list(range(len(pairs))))]]
    extents = [Extent.of(pair, packed) for pair in pairs]
    split: list[list[Pass]] = []
    groups: list[list[int]] = []
    for number in sorted(range(len(pairs)), key=lambda number: -extents[number].tokens):
        if extents[number].tokens > max_tokens:
            split.append(_by_prompts(number, pairs[number], max_tokens, packed))
            continue
        for group in groups:
            if tokens_together([extents[member] for member in [*group, number]], packed) <= max_tokens:
                group.append(number)
                break
        else:
            groups.append([number])
    return [*split, *([Pass(sorted(group))] for group in groups)]


def _by_prompts(number: int, pair: Pair, max_tokens: int, packed: bool) -> list[Pass]:
    cuts = [0]
    for prompt in range(1, len(pair.prompts)):
        if Extent.of(_of_prompts(pair, (cuts[-1], prompt + 1)), packed).tokens > max_tokens:
            cuts.append(prompt)
    if len(cuts) == 1:
        return [Pass([number])]
    return [Pass([number], (start, end)) for start, end in pairwise([*cuts, len(pair.prompts)])]


class Extent(NamedTuple):
    """Size of a pair in a pass."""

    rows: int
    width: int
    tokens: int
    """Tokens of a pass over this pair alone, padding included."""

    @classmethod
    def of(cls, pair: Pair, packed: bool) -> Self:
        """Compute the extent of one pair."""
        rows = 2 * len(pair.prompts)
        width = max(map(len, pair.prompts)) + max(len(pair.chosen), len(pair.rejected))
        return cls(rows, width, trie_size(pair) if packed else rows * width)


def tokens_together(extents: Sequence[Extent], packed: bool) -> int:
    """Count the tokens of a pass over several pairs, padding included; tokens that they share count for each."""
    if packed:
        return sum(extent.tokens for extent in extents)
    return sum(extent.rows for extent in extents) * max(extent.width for extent in extents)


def pass_tokens(pair: Pair, one: Pass, packed: bool) -> int:
    """Count the tokens of a pass over one pair, padding included."""
    return Extent.of(_of_prompts(pair, one.prompts), packed).tokens


def lay_out(pairs: Sequence[Pair], one: Pass, packed: bool, pad_token_id: int) -> dict[str, Any]:
    """Make the inputs of one pass with `pack` or `pad`, and add `pairs` [b] and `prompts` of the pass."""
    own = [_of_prompts(pairs[number], one.prompts) for number in one.pairs]
    batch = pack(own) if packed else pad(own, pad_token_id)
    return {**batch, "pairs": torch.tensor(one.pairs), "prompts": one.prompts}


def _of_prompts(pair: Pair, prompts: tuple[int, int] | None) -> Pair:
    return pair._replace(prompts=pair.prompts[slice(*prompts)]) if prompts else pair


class PassCounts:
    """Finds the largest number of passes over all ranks, since every rank of a sharded model must run each pass.

    The ranks communicate through gloo on the CPU, so that no rank waits for its accelerator.

    Args:
        differ: whether ranks may have different numbers of passes; without it there is no communication.
    """

    def __init__(self, differ: bool) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if together and differ else None

    def missing(self, *passes: int) -> list[int]:
        """Return how many dummy forward passes of each kind this rank must add to its own number of `passes`.

        Every rank must call this before the first of these passes.
        """
        if self._group is None:
            return [0] * len(passes)
        most = torch.tensor(passes)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
        return [int(number) - own for number, own in zip(most, passes, strict=True)]

"""A micro-batch -> the forward passes that compute it, each within a number of tokens, as many on every rank."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from axolotl_mopo.logprobs.trees import Pair, pack, pad, trie_size


class Pass(NamedTuple):
    """What one forward pass computes of a micro-batch."""

    pairs: list[int]
    """The numbers of its pairs in the micro-batch."""
    prompts: tuple[int, int] | None = None
    """The first of its prompts and one past the last, if it is a part of a single pair; None for all prompts."""


def split_into_passes(pairs: Sequence[Pair], max_tokens: int | None, packed: bool) -> list[list[Pass]]:
    """Split pairs into as few passes as first-fit decreasing finds.

    A pair that is too long for a pass is split between its prompts; what is still too long runs by itself.

    Args:
        pairs: of a micro-batch.
        max_tokens: of a pass, padding included; None for a single pass.
        packed: whether passes are packed trees or padded rows.

    Returns:
        Groups of passes: one pass of whole pairs, or the passes of a split pair.
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
    """What a pair takes up in a pass."""

    rows: int
    width: int
    tokens: int
    """Of the pair by itself, padding included."""

    @classmethod
    def of(cls, pair: Pair, packed: bool) -> Self:
        """The extent of one pair."""
        rows = 2 * len(pair.prompts)
        width = max(map(len, pair.prompts)) + max(len(pair.chosen), len(pair.rejected))
        return cls(rows, width, trie_size(pair) if packed else rows * width)


def tokens_together(extents: Sequence[Extent], packed: bool) -> int:
    """Tokens of a pass over several pairs, padding included; what they share is counted for each."""
    if packed:
        return sum(extent.tokens for extent in extents)
    return sum(extent.rows for extent in extents) * max(extent.width for extent in extents)


def pass_tokens(pair: Pair, one: Pass, packed: bool) -> int:
    """Tokens of a pass over one pair, padding included."""
    return Extent.of(_of_prompts(pair, one.prompts), packed).tokens


def lay_out(pairs: Sequence[Pair], one: Pass, packed: bool, pad_token_id: int) -> dict[str, Any]:
    """The inputs of one pass, as `pack` or `pad` makes them, with `pairs` [b] and `prompts` of the pass."""
    own = [_of_prompts(pairs[number], one.prompts) for number in one.pairs]
    batch = pack(own) if packed else pad(own, pad_token_id)
    return {**batch, "pairs": torch.tensor(one.pairs), "prompts": one.prompts}


def _of_prompts(pair: Pair, prompts: tuple[int, int] | None) -> Pair:
    return pair._replace(prompts=pair.prompts[slice(*prompts)]) if prompts else pair


class PassCounts:
    """Tells every rank how many passes the busiest one makes, since the ranks of a sharded model only run together.

    The ranks talk by gloo, from CPU to CPU, so that no accelerator is waited for.

    Args:
        differ: whether ranks may have different numbers of passes; they do not talk where they may not.
    """

    def __init__(self, differ: bool) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if together and differ else None

    def missing(self, *passes: int) -> list[int]:
        """How many dummy forward passes of each kind this rank must add to those that it is about to make.

        Every rank must ask before it makes the first of them.
        """
        if self._group is None:
            return [0] * len(passes)
        most = torch.tensor(passes)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
        return [int(number) - own for number, own in zip(most, passes, strict=True)]

"""A micro-batch -> the passes that compute it, each within a number of tokens."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch

from axolotl_mopo.engine.trees import Pair, pack, pad, trie_size


class Share(NamedTuple):
    """What one forward pass computes of a micro-batch."""

    pairs: list[int]
    """The numbers of its pairs in the micro-batch."""
    prompts: tuple[int, int] | None = None
    """The first and one past the last of the prompts, where it is a part of a single pair; None for all."""


def share_out(pairs: Sequence[Pair], max_tokens: int | None, packed: bool) -> list[list[Share]]:
    """Spread pairs over as few passes as first-fit decreasing finds.

    A pair that is too long for a pass is split between its prompts; what is still too long runs by itself.

    Args:
        pairs: of a micro-batch.
        max_tokens: of a pass, padding included; None for a single pass.
        packed: whether passes are packed trees or padded rows.

    Returns:
        Units: one share of whole pairs, or the shares of a split pair.
    """
    if max_tokens is None:
        return [[Share(list(range(len(pairs))))]]
    extents = [Extent.of(pair, packed) for pair in pairs]
    split: list[list[Share]] = []
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
    return [*split, *([Share(sorted(group))] for group in groups)]


def _by_prompts(number: int, pair: Pair, max_tokens: int, packed: bool) -> list[Share]:
    cuts = [0]
    for prompt in range(1, len(pair.prompts)):
        if Extent.of(_of_prompts(pair, (cuts[-1], prompt + 1)), packed).tokens > max_tokens:
            cuts.append(prompt)
    if len(cuts) == 1:
        return [Share([number])]
    return [Share([number], (start, end)) for start, end in pairwise([*cuts, len(pair.prompts)])]


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


def share_size(pair: Pair, share: Share, packed: bool) -> int:
    """Tokens of a pass over its share of one pair, padding included."""
    return Extent.of(_of_prompts(pair, share.prompts), packed).tokens


def lay_out(pairs: Sequence[Pair], share: Share, packed: bool, pad_token_id: int) -> dict[str, Any]:
    """The batch of one pass, as `pack` or `pad` makes it, with `pairs` [B], and `prompts` as its share has them."""
    own = [_of_prompts(pairs[number], share.prompts) for number in share.pairs]
    batch = pack(own) if packed else pad(own, pad_token_id)
    return {**batch, "pairs": torch.tensor(share.pairs), "prompts": share.prompts}


def _of_prompts(pair: Pair, prompts: tuple[int, int] | None) -> Pair:
    return pair._replace(prompts=pair.prompts[slice(*prompts)]) if prompts else pair

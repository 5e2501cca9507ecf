"""A micro-batch in several passes: within their tokens, and with the loss and gradients of a single pass."""

import random

import pytest
import torch
from conftest import CONFIGS, build_model, ragged_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_mopo.logprobs.attention import use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer, joined
from axolotl_mopo.logprobs.passes import lay_out, pass_tokens, split_into_passes
from axolotl_mopo.logprobs.trees import Pair
from axolotl_mopo.training.collator import PairCollator

LENGTHS = st.integers(1, 30)
SHAPES = st.lists(st.tuples(st.lists(LENGTHS, min_size=3, max_size=3), LENGTHS, LENGTHS), min_size=1, max_size=6)


def random_pairs(shapes):
    rng = random.Random(0)

    def tokens(count):
        return [rng.randrange(3, 97) for _ in range(count)]

    return [
        Pair([tokens(n) for n in prompts], tokens(chosen), tokens(rejected)) for prompts, chosen, rejected in shapes
    ]


def tokens_of(one):
    return one["input_ids"].numel()


@settings(deadline=None, max_examples=200)
@given(SHAPES, st.integers(1, 400), st.booleans())
def test_every_prompt_of_every_pair_is_in_one_pass_of_no_more_tokens_than_allowed(shapes, max_tokens, packed):
    pairs = random_pairs(shapes)
    seen = []
    for unit in split_into_passes(pairs, max_tokens, packed):
        for share in unit:
            first, end = share.prompts or (0, 3)
            seen += [(number, prompt) for number in share.pairs for prompt in range(first, end)]
            if tokens_of(lay_out(pairs, share, packed, 0)) > max_tokens:
                assert len(share.pairs) == 1
                assert end - first == 1  # a prompt and its two completions are never split
        assert len(unit) == 1 or all(share.pairs == unit[0].pairs and len(share.pairs) == 1 for share in unit)
    assert sorted(seen) == [(number, prompt) for number in range(len(pairs)) for prompt in range(3)]


@pytest.mark.parametrize("packed", [True, False])
def test_sizes_are_those_of_the_batches(packed):
    pairs = ragged_pairs()
    for unit in split_into_passes(pairs, 30, packed):
        for share in unit:
            if len(share.pairs) == 1:
                one = lay_out(pairs, share, packed, 0)
                assert pass_tokens(pairs[share.pairs[0]], share, packed) == tokens_of(one)
                assert (one["pairs"].tolist(), one["prompts"]) == (share.pairs, share.prompts)


def test_without_a_limit_there_is_one_pass():
    ((share,),) = split_into_passes(ragged_pairs(), None, True)
    assert share.pairs == [0, 1, 2]
    assert share.prompts is None


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [20, 40, 75])
def test_the_scores_of_all_passes_are_those_of_one(packed, max_tokens):
    model = build_model(CONFIGS["llama"], dtype=torch.float64)
    if packed:
        use_tree_attention(model)
    pairs, scorer = ragged_pairs(), LogProbComputer()
    ((whole,),) = collated(pairs, None, packed)
    expected = scorer(model, whole).logps.view(len(pairs), -1)
    units = collated(pairs, max_tokens, packed)
    assert sum(map(len, units)) > 1
    for unit in units:
        logps = joined([scorer(model, one) for one in unit]).logps
        assert torch.allclose(logps, expected[unit[0]["pairs"]].flatten(), atol=1e-6)


def collated(pairs, max_tokens, packed):
    rows = [
        {"prompt_input_ids": pair.prompts, "chosen_input_ids": pair.chosen, "rejected_input_ids": pair.rejected}
        for pair in pairs
    ]
    return PairCollator(0, packed, max_tokens)(rows)["groups"]


def plain_pairs(sizes, prompts=1):
    """Pairs that share nothing and have so many tokens for each prompt, in packed trees and in padded rows alike."""
    rng = random.Random(1)

    def tokens(count):
        return [rng.randrange(3, 30_000) for _ in range(count)]

    # A row is as wide as its prompt and a completion: as many tokens as the tree has where the prompt is the padding.
    return [Pair([tokens(size - 2) for _ in range(prompts)], tokens(1), tokens(1)) for size in sizes]


def layout(pairs, max_tokens, packed=True):
    return [
        [(share.pairs, *([share.prompts] if share.prompts else [])) for share in unit]
        for unit in split_into_passes(pairs, max_tokens, packed)
    ]


def test_passes_are_filled_to_the_last_token_the_longest_pairs_first():
    pairs = plain_pairs([4, 5, 10, 5, 6])
    assert layout(pairs, 10) == [[([2],)], [([0, 4],)], [([1, 3],)]]
    assert layout(pairs, 9) == [[([2],)], [([4],)], [([0, 1],)], [([3],)]]


def test_padded_passes_count_every_row_as_wide_as_the_widest():
    pairs = [Pair([[5] * prompt], [6] * 2, [7]) for prompt in (8, 2, 3, 2)]  # rows of 10, 4, 5 and 4
    assert layout(pairs, 40, packed=False) == [[([0, 2],)], [([1, 3],)]]
    assert layout(pairs, 39, packed=False) == [[([0],)], [([1, 2, 3],)]]
    assert layout(pairs, 29, packed=False) == [[([0],)], [([1, 2],)], [([3],)]]


@pytest.mark.parametrize("packed", [True, False])
def test_a_pair_is_split_only_where_it_must_be_and_into_as_few_parts_as_its_prompts_allow(packed):
    (pair,) = plain_pairs([8], prompts=5)
    each = 8 if packed else 14
    assert layout([pair], 5 * each, packed) == [[([0],)]]
    assert layout([pair], 5 * each - 1, packed) == [[([0], (0, 4)), ([0], (4, 5))]]
    assert layout([pair], 2 * each, packed) == [[([0], (0, 2)), ([0], (2, 4)), ([0], (4, 5))]]
    assert layout([pair], 2 * each - 1, packed) == [[([0], (number, number + 1)) for number in range(5)]]
    short, long = plain_pairs([8, 9])
    assert layout([short, long], 1, packed) == [[([1],)], [([0],)]]  # a single prompt is no part


def test_the_padding_token_is_the_tokenizers():
    pairs = ragged_pairs()
    ((share,),) = split_into_passes(pairs, None, False)
    one = lay_out(pairs, share, False, 96)
    assert (one["input_ids"][one["attention_mask"] == 0] == 96).all()
    assert one["attention_mask"].sum() == sum(
        len(prompt) + len(side) for pair in pairs for prompt in pair.prompts for side in (pair.chosen, pair.rejected)
    )
    starts = [len(prompt) for pair in pairs for prompt in pair.prompts]
    assert one["logits_to_keep"].tolist() == list(range(min(starts) - 1, one["input_ids"].shape[1] - 1))

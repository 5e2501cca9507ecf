"""Pairs of rated responses: the same for every number of processes, capped by a seed, and how far orders agree."""

import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from conftest import prepare
from datasets import Dataset
from test_formats import ATTRIBUTES, completion, rated, read, reader

from axolotl_mopo.data.store import PairStore


def helpsteer_rows(count, seed=0):
    """One to five neighbouring responses to each prompt; a few prompts come back later in the file."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        prompt = f"Question {rng.randrange(count // 2)}?"
        for _ in range(rng.randrange(1, 6)):
            scores = [rng.randrange(5) for _ in ATTRIBUTES]
            rows.append(rated(f"Response {len(rows)}.", *scores, prompt=prompt))
    return rows[:count]


def plain_pairs(rows, objective):
    """What the pairs must be, without any of the package's code: (chosen, rejected) texts."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    pairs = set()
    for group in by_prompt.values():
        for first, second in itertools.combinations(group, 2):
            if first[objective] != second[objective]:
                chosen, rejected = sorted((first, second), key=lambda row: -row[objective])
                pairs.add((chosen["response"], rejected["response"]))
    return pairs


@pytest.fixture(scope="module")
def rows():
    return helpsteer_rows(1003)


def test_no_pair_is_lost_and_none_is_made_twice(rows):
    made, tally = read("helpsteer", rows, objective=("helpfulness",))
    pairs = [(row["chosen"], row["rejected"]) for row in made]
    assert len(pairs) == len(set(pairs)) == tally.pairs
    assert set(pairs) == plain_pairs(rows, "helpfulness")


def test_rows_of_a_prompt_that_stand_far_apart_are_paired(rows):
    shuffled = random.Random(1).sample(rows, len(rows))
    made, _ = read("helpsteer", shuffled, objective=("coherence",))
    assert {(row["chosen"], row["rejected"]) for row in made} == plain_pairs(rows, "coherence")


def test_prepared_rows_are_the_same_for_every_number_of_processes(rows, tokenizer):
    prepared = [json.dumps(prepare(rows, tokenizer, kind="helpsteer", num_proc=processes)) for processes in (1, 2, 4)]
    assert prepared[0] == prepared[1] == prepared[2]
    assert len(json.loads(prepared[0])) == len(plain_pairs(rows, "helpfulness"))


def test_a_store_gives_every_batch_of_rows_its_pairs(rows, tmp_path):
    made = list(reader("helpsteer", rows, objective=("helpfulness",)).pairs())
    store = PairStore.write(iter(made), tmp_path)
    for size in (1, 7, 250, 1003):
        borders = [(start, min(start + size, len(rows)) - 1) for start in range(0, len(rows), size)]
        assert [found for border in borders for found in store.between(*border)] == made


def test_a_cap_keeps_pairs_that_the_seed_draws(rows):
    full, _ = read("helpsteer", rows, objective=("helpfulness",))
    capped, tally = read("helpsteer", rows, objective=("helpfulness",), max_pairs_per_prompt=2)
    other, _ = read("helpsteer", rows, objective=("helpfulness",), max_pairs_per_prompt=2, seed=7)
    per_prompt = Counter(row["prompt"][0]["content"] for row in full)
    assert Counter(row["prompt"][0]["content"] for row in capped) == {
        prompt: min(count, 2) for prompt, count in per_prompt.items()
    }
    assert all(row in full for row in capped)
    assert tally.capped == len(full) - len(capped) > 100
    assert capped != other
    assert len(capped) == len(other)
    assert capped == read("helpsteer", rows, objective=("helpfulness",), max_pairs_per_prompt=2)[0]


def test_labelled_pairs_of_a_prompt_are_capped_too():
    rows = [{"question": f"q{i % 3}", "response_j": f"j{i}", "response_k": f"k{i}"} for i in range(10)]
    made, tally = read("stack_exchange_paired", rows, max_pairs_per_prompt=1)
    assert Counter(row["prompt"][0]["content"] for row in made) == {"q0": 1, "q1": 1, "q2": 1}
    assert (tally.rows, tally.pairs, tally.capped) == (10, 3, 7)


def test_agreement_counts_orders_that_neither_leaves_equal(rows):
    source = reader("helpsteer", rows, objective=("helpfulness",))
    made = [pair for _, pair in source.pairs()]
    names = ["helpfulness", "verbosity", "overall"]
    signs = [[1, *(np.sign(pair.chosen.scores[name] - pair.rejected.scores[name]) for name in names)] for pair in made]
    matrix = source.tally.agreement(names)
    for i, j in itertools.product(range(4), repeat=2):
        both = [sign[i] * sign[j] for sign in signs if sign[i] * sign[j] != 0]
        assert math.isclose(matrix[i, j], sum(product > 0 for product in both) / len(both))
    assert matrix[0, 1] == 1  # helpfulness is the label
    assert source.tally.below("verbosity") == sum(sign[2] < 0 for sign in signs)


def test_agreement_where_scores_come_and_go():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_scores": chosen, "rejected_scores": rejected}
        for chosen, rejected in [
            ({"x": 1, "y": None}, {"x": 0, "y": 1}),
            ({"x": 0, "y": 2}, {"x": 1, "y": 1}),
            ({"x": None, "y": 3}, {"x": 1, "y": 3}),
        ]
    ]
    source = reader("pairs", rows)
    list(source.pairs())
    matrix = source.tally.agreement(["x", "y", "z"])
    assert source.tally.names == source.tally.score_names == ["x", "y"]
    assert matrix[0, :3].tolist() == [1, 0.5, 1]
    assert matrix[1, 2] == 0
    assert np.isnan(matrix[3, :]).all()


def test_rows_without_responses_are_counted():
    rows = [
        {"instruction": "p", "completions": [completion("A", *"1111"), completion("B", *"5555")]},
        {"instruction": "q", "completions": []},
    ]
    made, tally = read("ultrafeedback", rows, objective=("honesty",))
    assert len(made) == tally.empty == 1
    assert "1 rows without a response left out" in tally.lines()


def test_an_empty_group_column_is_named():
    source = reader("helpsteer", Dataset.from_list([{"response": "a"}]), objective=("overall",))
    with pytest.raises(ValueError, match="no column `prompt`; its columns are response"):
        list(source.pairs())

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

from axolotl_mopo.data.pair_store import PairStore
from axolotl_mopo.errors import DataError


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
    made, stats = read("helpsteer", rows, objective=("helpfulness",))
    pairs = [(row["chosen"], row["rejected"]) for row in made]
    assert len(pairs) == len(set(pairs)) == stats.pairs
    assert set(pairs) == plain_pairs(rows, "helpfulness")


def test_rows_of_a_prompt_that_stand_far_apart_are_paired(rows):
    shuffled = random.Random(1).sample(rows, len(rows))
    made, _ = read("helpsteer", shuffled, objective=("coherence",))
    assert {(row["chosen"], row["rejected"]) for row in made} == plain_pairs(rows, "coherence")


def test_prepared_rows_are_the_same_for_every_number_of_processes(rows, tokenizer):
    prepared = [json.dumps(prepare(rows, tokenizer, kind="helpsteer", num_proc=processes)) for processes in (1, 2, 4)]
    assert prepared[0] == prepared[1] == prepared[2]
    assert len(json.loads(prepared[0])) == len(plain_pairs(rows, "helpfulness"))


def ultrafeedback_rows(*ratings):
    """One instruction with a completion for every (helpfulness, overall)."""
    completions = [completion(f"r{n}", "1", "1", "1", str(h), overall=o) for n, (h, o) in enumerate(ratings)]
    return [{"instruction": "p", "completions": completions}]


def chosen_of(made):
    return [(pair["chosen"], pair["rejected"]) for pair in made]


def test_scores_of_unlike_scales_count_alike_in_a_mean():
    # Of 1..5 and of 1..10: (5, 1) is 1 and 0, (2, 6) is 0.25 and 0.56, (1, 10) is 0 and 1.
    rows = ultrafeedback_rows((5, 1.0), (2, 6.0), (1, 10.0))
    made, stats = read("ultrafeedback", rows, objective=("helpfulness", "overall"))
    assert chosen_of(made) == [("r0", "r1"), ("r2", "r1")]
    assert stats.ties == 1  # by their bare mean, r1 would be better than r0, and r2 than both
    same = read("ultrafeedback", rows, objective=("helpfulness", "overall"), score_scale=(1, 10))[0]
    assert chosen_of(same) == [("r1", "r0"), ("r2", "r0"), ("r2", "r1")]


def test_scores_of_one_scale_are_averaged_as_they_are():
    rows = [rated(text, *scores) for text, *scores in [("A", 4, 0, 0, 0, 0), ("B", 1, 2, 0, 0, 0)]]
    assert chosen_of(read("helpsteer", rows, objective=("helpfulness", "correctness"))[0]) == [("A", "B")]


def scored(*scores):
    return [{"prompt": "p", "response": f"r{n}", **dict(zip("xy", each, strict=True))} for n, each in enumerate(scores)]


def test_scores_of_unknown_scales_are_standardised_before_they_are_averaged():
    scores = [(0.0, 300.0), (1.0, 100.0), (0.8, 250.0), (None, 9.0), (0.2, None)]
    made, stats = read("responses", scored(*scores), objective=("x", "y"))
    x, y = np.array([0.0, 1.0, 0.8, 0.2]), np.array([300.0, 100.0, 250.0, 9.0])
    order = [(a - x.mean()) / x.std() + (b - y.mean()) / y.std() for a, b in scores[:3]]
    expected = [
        (f"r{i}", f"r{j}") if order[i] > order[j] else (f"r{j}", f"r{i}")
        for i, j in itertools.combinations(range(3), 2)
    ]
    assert chosen_of(made) == expected
    assert expected[0] == ("r1", "r0")  # and not as the bare sums, which y alone decides
    assert (stats.rows, stats.unscored) == (5, 2)
    capped, _ = read("responses", scored(*scores), objective=("x", "y"), max_pairs_per_prompt=2)
    assert len(capped) == 2
    assert all(pair in made for pair in capped)


def test_a_scale_that_is_given_holds_for_every_score_that_orders():
    rows = [{**row, "b": value} for row, value in zip(scored(*[(5, 1), (1, 2), (3, 3)]), (10, 40, 20), strict=True)]
    source = reader("responses", rows, objective=("a", "b"), score_scale=[1, 5])
    with pytest.raises(DataError, match="its score of b, 10, is outside 1 to 5"):
        list(source.pairs())


def test_responses_that_are_left_out_do_not_count_in_the_units():
    rows = [{**row, "finished": True} for row in scored((0.0, 3.0), (1.0, 1.0), (2.0, 2.0))]
    expected, _ = read("responses", rows, objective=("x", "y"))
    far = {**scored((1e6, -50.0))[0], "finished": False}
    assert read("responses", [*rows, far], objective=("x", "y"))[0] == expected
    bad = {**far, "finished": None, "response": " "}
    made, stats = read("responses", [*rows, bad], objective=("x", "y"), on_bad_row="drop")
    assert made == expected
    assert stats.bad == {"empty response": 1}


@pytest.mark.parametrize("scores", [[(1.0, 3.0), (1.0, 2.0)], [(1e308, 3.0), (-1e308, 2.0)]])
def test_a_score_that_has_no_unit_is_refused_in_a_mean_and_not_alone(scores):
    with pytest.raises(DataError, match=r"data.jsonl: the score x lies between .* for all responses, so it cannot be"):
        read("responses", scored(*scores), objective=("x", "y"))
    assert len(read("responses", scored(*scores), objective=("y",))[0]) == 1


def test_sums_that_differ_by_rounding_alone_are_a_tie():
    rows = scored((0.1, 0.3), (0.2, 0.2), (0.3, 0.1))
    _, stats = read("responses", rows, objective=("x", "y"))
    assert stats.ties == 3


def test_a_store_gives_every_batch_of_rows_its_pairs(rows, tmp_path):
    made = list(reader("helpsteer", rows, objective=("helpfulness",)).pairs())
    store = PairStore.write(iter(made), tmp_path)
    for size in (1, 7, 250, 1003):
        borders = [(start, min(start + size, len(rows)) - 1) for start in range(0, len(rows), size)]
        assert [found for border in borders for found in store.between(*border)] == made


def test_a_cap_keeps_pairs_that_the_seed_draws(rows):
    full, _ = read("helpsteer", rows, objective=("helpfulness",))
    capped, stats = read("helpsteer", rows, objective=("helpfulness",), max_pairs_per_prompt=2)
    other, _ = read("helpsteer", rows, objective=("helpfulness",), max_pairs_per_prompt=2, seed=7)
    per_prompt = Counter(row["prompt"][0]["content"] for row in full)
    assert Counter(row["prompt"][0]["content"] for row in capped) == {
        prompt: min(count, 2) for prompt, count in per_prompt.items()
    }
    assert all(row in full for row in capped)
    assert stats.capped == len(full) - len(capped) > 100
    assert capped != other
    assert len(capped) == len(other)
    assert capped == read("helpsteer", rows, objective=("helpfulness",), max_pairs_per_prompt=2)[0]


def test_a_cap_draws_anew_for_every_prompt_and_keeps_the_order():
    """Twelve prompts with five pairs each, of which three are kept."""
    rows = [{"question": f"q{n // 5}", "response_j": f"j{n % 5}", "response_k": "k"} for n in range(60)]
    made, _ = read("stack_exchange_paired", rows, max_pairs_per_prompt=3)
    kept = [[row["chosen"] for row in made[start : start + 3]] for start in range(0, 36, 3)]
    assert [row["prompt"][0]["content"] for row in made] == [f"q{n // 3}" for n in range(36)]
    assert all(each == sorted(each) for each in kept)
    assert len({tuple(each) for each in kept}) > 3


def test_responses_that_differ_in_blanks_alone_are_one_text():
    rows = [rated(text, *scores) for text, *scores in [("A", 4, 0, 0, 0, 0), (" A\n", 1, 2, 0, 0, 0)]]
    made, stats = read("helpsteer", rows, objective=("helpfulness",))
    assert (made, stats.identical, stats.alone) == ([], 1, 0)


def test_labelled_pairs_of_a_prompt_are_capped_too():
    rows = [{"question": f"q{i % 3}", "response_j": f"j{i}", "response_k": f"k{i}"} for i in range(10)]
    made, stats = read("stack_exchange_paired", rows, max_pairs_per_prompt=1)
    assert Counter(row["prompt"][0]["content"] for row in made) == {"q0": 1, "q1": 1, "q2": 1}
    assert (stats.rows, stats.pairs, stats.capped) == (10, 3, 7)


def test_agreement_counts_orders_that_neither_leaves_equal(rows):
    source = reader("helpsteer", rows, objective=("helpfulness",))
    made = [pair for _, pair in source.pairs()]
    names = ["helpfulness", "verbosity", "overall"]
    signs = [[1, *(np.sign(pair.chosen.scores[name] - pair.rejected.scores[name]) for name in names)] for pair in made]
    matrix = source.stats.agreement(names)
    for i, j in itertools.product(range(4), repeat=2):
        both = [sign[i] * sign[j] for sign in signs if sign[i] * sign[j] != 0]
        assert math.isclose(matrix[i, j], sum(product > 0 for product in both) / len(both))
    assert matrix[0, 1] == 1  # helpfulness is the label
    assert source.stats.below("verbosity") == sum(sign[2] < 0 for sign in signs)


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
    matrix = source.stats.agreement(["x", "y", "z"])
    assert source.stats.names == source.stats.score_names == ["x", "y"]
    assert matrix[0, :3].tolist() == [1, 0.5, 1]
    assert matrix[1, 2] == 0
    assert np.isnan(matrix[3, :]).all()


def test_rows_without_responses_are_counted():
    rows = [
        {"instruction": "p", "completions": [completion("A", *"1111"), completion("B", *"5555")]},
        {"instruction": "q", "completions": []},
    ]
    made, stats = read("ultrafeedback", rows, objective=("honesty",))
    assert len(made) == stats.empty == 1
    assert "1 rows without a response left out" in stats.lines()


def test_an_empty_group_column_is_named():
    source = reader("helpsteer", Dataset.from_list([{"response": "a"}]), objective=("overall",))
    with pytest.raises(ValueError, match="no column `prompt`; its columns are response"):
        list(source.pairs())

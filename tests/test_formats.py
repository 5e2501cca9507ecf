"""Every strategy on rows of the real shape: the canonical rows that come of them, and the traps of each."""

import re

import pytest
from datasets import Audio, Dataset, Features, Image, List, Video

from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.errors import DataError

USER = [{"role": "user", "content": "Why is the sky blue?"}]


def reader(kind, rows, objective=(), chosen_scores=(), rejected_scores=(), scales=None, seed=42, **options):
    spec = DataSpec(
        where="data.jsonl",
        strategy=kind,
        options=options,
        objective=objective,
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        scales=scales or {},
        seed=seed,
    )
    return PairReader(Dataset.from_list(rows), spec)


def read(kind, rows, **settings):
    """The canonical rows, and the stats."""
    source = reader(kind, rows, **settings)
    return [pair.to_row() for _, pair in source.pairs()], source.stats


def canonical(chosen, rejected, prompt=USER, chosen_scores=None, rejected_scores=None):
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_scores": chosen_scores or {},
        "rejected_scores": rejected_scores or {},
    }


def test_what_is_written_is_read_back_as_it_was():
    row = canonical("Light.", "Dunno.", chosen_scores={"a": 1.0, "b": None}, rejected_scores={"a": 0.0, "b": 2.0})
    assert read("pairs", [row])[0] == [row]


def test_scored_responses_are_paired_by_any_of_their_scores():
    common = {"prompt_id": 0, "prompt": USER, "token_ids": [1, 2], "finished": True, "logp": -3.0, "ref_logp": -2.0}
    rows = [
        {**common, "sample": sample, "response": text, "nice": nice, "brief": brief}
        for sample, (text, nice, brief) in enumerate([("A", 1.5, -1.0), ("B", 2.5, -4.0), ("C", 1.5, -2.0)])
    ]
    pairs, stats = read("responses", rows, objective=("nice",))
    b, others = {"nice": 2.5, "brief": -4.0}, {"A": {"nice": 1.5, "brief": -1.0}, "C": {"nice": 1.5, "brief": -2.0}}
    expected = [canonical("B", name, chosen_scores=b, rejected_scores=scores) for name, scores in others.items()]
    assert pairs == expected
    assert (stats.rows, stats.ties) == (3, 1)
    with pytest.raises(DataError, match="its responses are rated but not ordered; set `objective` to one or several"):
        reader("responses", rows)


def response_row(text, nice, **columns):
    return {"prompt": USER, "response": text, "nice": nice, **columns}


def test_responses_that_were_cut_off_are_left_out_unless_they_are_asked_for():
    rows = [response_row("A", 1, finished=True), response_row("B", 2, finished=False), response_row("C", 3)]
    made, stats = read("responses", rows, objective=("nice",))
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [("C", "A")]
    assert "1 responses that were cut off left out" in stats.lines()
    made, stats = read("responses", rows, objective=("nice",), keep_unfinished=True)
    assert (len(made), stats.left_out) == (3, {})
    odd = [response_row("A", 1, finished="no"), response_row("B", 2, finished="yes")]
    for keep in (False, True):
        with pytest.raises(DataError, match="row 0: its `finished` is 'no'; it must be true or false"):
            read("responses", odd, objective=("nice",), keep_unfinished=keep)


def test_amopo_scores_are_strings():
    row = {
        "prompt": "Why is the sky blue?",
        "chosen": {"response": "Light.", "helpfulness": "4", "correctness": "3", "instruction_following": "N/A"},
        "rejected": {"response": "Dunno.", "helpfulness": "0", "correctness": None, "instruction_following": "10"},
    }
    rows, _ = read("amopo", [row])
    assert rows == [
        canonical(
            "Light.",
            "Dunno.",
            chosen_scores={"helpfulness": 4.0, "correctness": 3.0, "instruction_following": None},
            rejected_scores={"helpfulness": 0.0, "correctness": None, "instruction_following": 10.0},
        )
    ]


def test_amopo_prompts_have_the_marked_turns_of_helpsteer():
    sides = {"chosen": {"response": "Light.", "h": "4"}, "rejected": {"response": "Dunno.", "h": "0"}}
    for prompt in (MARKED, TURNS):
        assert read("amopo", [{"prompt": prompt, **sides}])[0][0]["prompt"] == TURNS


ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def rated(response, *scores, prompt="Why is the sky blue?"):
    return {"prompt": prompt, "response": response, **dict(zip(ATTRIBUTES, scores, strict=True))}


def with_overall(*scores):
    return dict(zip((*ATTRIBUTES, "overall"), (*scores, sum(scores) / 5), strict=True))


@pytest.mark.parametrize("kind", ["helpsteer", "helpsteer2"])
def test_helpsteer_pairs_every_two_responses_to_a_prompt(kind):
    rows = [
        rated("A", 3, 4, 4, 2, 2),
        rated("B", 4, 4, 4, 1, 1),
        rated("C", 3, 1, 4, 2, 0),
        rated("X", 1, 1, 1, 1, 1, prompt="Another one?"),
    ]
    made, stats = read(kind, rows, objective=("helpfulness",))
    scores = {"A": with_overall(3, 4, 4, 2, 2), "B": with_overall(4, 4, 4, 1, 1), "C": with_overall(3, 1, 4, 2, 0)}
    assert made == [
        canonical("B", "A", chosen_scores=scores["B"], rejected_scores=scores["A"]),
        canonical("B", "C", chosen_scores=scores["B"], rejected_scores=scores["C"]),
    ]
    assert (stats.rows, stats.pairs, stats.ties, stats.alone) == (4, 2, 1, 1)


def test_the_mean_of_several_attributes_orders():
    rows = [rated("A", 3, 4, 4, 2, 2), rated("B", 4, 4, 4, 1, 1), rated("C", 3, 1, 4, 2, 0)]
    made, _ = read("helpsteer", rows, objective=("correctness", "verbosity"))
    assert [(row["chosen"], row["rejected"]) for row in made] == [("A", "B"), ("A", "C"), ("B", "C")]
    made, stats = read("helpsteer", rows, objective=("overall",))  # 3, 2.8 and 2
    assert [(row["chosen"], row["rejected"]) for row in made] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert stats.ties == 0


MARKED = "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy is the sky blue?"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, *USER]


@pytest.mark.parametrize("prompt", [MARKED, MARKED + "\n<extra_id_1>Assistant\n"])
def test_helpsteer2_keeps_the_turns_of_a_prompt_apart(prompt):
    rows = [rated("A", 3, 4, 4, 2, 2, prompt=prompt), rated("B", 4, 4, 4, 1, 1, prompt=prompt)]
    assert read("helpsteer2", rows, objective=("helpfulness",))[0][0]["prompt"] == TURNS
    with pytest.raises(DataError, match=r"row 0: its prompt ends with an assistant turn"):
        read(
            "helpsteer2",
            [rated("A", 1, 1, 1, 1, 1, prompt="Hi\n<extra_id_1>Assistant\nHello.")],
            objective=("overall",),
        )


def test_helpsteer2_preference_part():
    def row(strength, prompt="Why is the sky blue?"):
        return {"prompt": prompt, "response_1": "One", "response_2": "Two", "preference_strength": strength}

    made, stats = read("helpsteer2", [row(-3), row(0), row(1, MARKED)], objective=("helpfulness",))
    assert made == [canonical("One", "Two"), canonical("Two", "One", prompt=TURNS)]
    assert (stats.rows, stats.pairs, stats.ties) == (3, 2, 1)


def preference(strength, **columns):
    return {
        "prompt": "Why is the sky blue?",
        "response_1": "One",
        "response_2": "Two",
        "preference_strength": strength,
        **columns,
    }


def test_helpsteer2_preferences_are_joined_with_their_ratings(tmp_path):
    ratings = [
        rated("One", 3, 4, 4, 2, 2),
        rated(" Two\n", 4, 4, 4, 1, 1),
        rated("Three", 1, 1, 1, 1, 1),
        rated("Three", 1, 1, 1, 1, 2),  # nothing tells which of both is right
        rated("Four", None, 1, 1, 1, 1),
    ]
    Dataset.from_list(ratings).to_parquet(tmp_path / "ratings.parquet")
    rows = [preference(-2), preference(0), *(preference(1, response_2=name) for name in ("Three", "Four", "Five"))]
    settings = {"objective": ("overall",), "ratings": str(tmp_path / "ratings.parquet")}
    made, stats = read("helpsteer2", rows, **settings, chosen_scores=("helpfulness",))
    assert made == [
        canonical(
            "One",
            "Two",
            chosen_scores=with_overall(3, 4, 4, 2, 2),
            rejected_scores=with_overall(4, 4, 4, 1, 1),
        )
    ]
    assert (stats.pairs, stats.ties, stats.incomplete, stats.bad) == (1, 1, 3, {})
    assert read("helpsteer2", rows, objective=("overall",))[0][0]["chosen_scores"] == {}
    assert read("helpsteer2", [preference(1, response_2="Four")], **settings)[0][0]["chosen_scores"] == {
        "correctness": 1.0,
        "coherence": 1.0,
        "complexity": 1.0,
        "verbosity": 1.0,
    }


def test_a_pair_of_which_one_response_is_rated_is_incomplete_whatever_is_needed(tmp_path):
    Dataset.from_list([rated("Two", 3, 4, 4, 2, 2)]).to_parquet(tmp_path / "ratings.parquet")
    for strength in (1, -1):  # the rated one is chosen, or rejected
        made, stats = read("helpsteer2", [preference(strength)], ratings=str(tmp_path / "ratings.parquet"))
        assert (made, stats.incomplete) == ([], 1)


def test_helpsteer2_preferences_may_hold_their_ratings_themselves(tmp_path):
    ratings = {f"{name}_{number}": number + 1 for name in ATTRIBUTES for number in (1, 2)}
    made, _ = read("helpsteer2", [preference(1, **ratings)])
    assert made == [
        canonical("Two", "One", chosen_scores=with_overall(*[3.0] * 5), rejected_scores=with_overall(*[2.0] * 5))
    ]
    Dataset.from_list([rated("One", 3, 4, 4, 2, 2)]).to_parquet(tmp_path / "ratings.parquet")
    with pytest.raises(DataError, match="row 0: it has ratings already, in `helpfulness_1`; remove `ratings` from"):
        read("helpsteer2", [preference(1, **ratings)], ratings=str(tmp_path / "ratings.parquet"))


def test_ratings_that_are_none_are_refused(tmp_path):
    Dataset.from_list([preference(1)]).to_parquet(tmp_path / "preferences.parquet")
    with pytest.raises(DataError, match=r"`ratings`, .*preferences.parquet, has no column response; its columns are"):
        read("helpsteer2", [preference(1)], ratings=str(tmp_path / "preferences.parquet"))
    with pytest.raises(
        DataError, match=r"row 0: it has no score of helpfulness .* it has no scores at all; name .* ratings"
    ):
        read("helpsteer2", [preference(1)], chosen_scores=("helpfulness",))
    ratings = str(tmp_path / "preferences.parquet")
    with pytest.raises(DataError, match="its rows have ratings already, so `ratings` has no effect; remove it"):
        read("helpsteer2", [rated("One", 3, 4, 4, 2, 2)], objective=("overall",), ratings=ratings)
    with pytest.raises(DataError, match="nowhere, split train, cannot be loaded"):
        read("helpsteer2", [preference(1)], ratings=str(tmp_path / "nowhere"))


def test_helpsteer2_preferences_of_several_splits_are_not_mixed():
    rows = [preference(-1, split="train"), preference(1, split="val"), preference(1, split="train")]
    message = r"several splits, train, val, which must not be mixed; select one with where: {split: train}"
    with pytest.raises(DataError, match=message):
        read("helpsteer2", rows)
    made, stats = read("helpsteer2", rows, where={"split": "train"})
    assert [pair["chosen"] for pair in made] == ["One", "Two"]
    assert "1 rows whose `split` is not 'train' left out" in stats.lines()
    assert len(read("helpsteer2", rows[::2])[0]) == 2
    rated_rows = [{**rated("A", 3, 4, 4, 2, 2), "split": "a"}, {**rated("B", 4, 4, 4, 1, 1), "split": "b"}]
    assert len(read("helpsteer2", rated_rows, objective=("overall",))[0]) == 1


def test_rows_of_other_values_of_a_column_are_left_out_before_they_are_read():
    rows = [{**rated("A", 1, 1, 1, 1, 1), "lang": "en", "n": 1}, {**rated("B", 2, 1, 1, 1, 1), "lang": "en", "n": 1}]
    rows += [{**rated("", 9, 1, 1, 1, 1), "lang": "de", "n": 1}, {**rated("C", 3, 1, 1, 1, 1), "lang": "en", "n": 2}]
    made, stats = read("helpsteer", rows, objective=("helpfulness",), where={"lang": "en", "n": 1})
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [("B", "A")]
    assert stats.left_out == {"rows whose `lang` is not 'en'": 1, "rows whose `n` is not 1": 1}
    assert (stats.rows, stats.alone) == (4, 0)
    with pytest.raises(DataError, match="`where` names the column language, which does not exist; its columns are"):
        reader("helpsteer", rows, objective=("helpfulness",), where={"language": "en"})


@pytest.mark.parametrize(
    ("values", "wanted", "kept"),
    [
        (["1", "2"], 1, 1),
        ([1, 2], 1, 1),
        ([True, False], True, 1),
        ([True, False], 1, 0),
        (["True", "true"], "true", 1),
        ([1.0, 2.5], 1, 1),
        ([None, "a"], "None", 0),
    ],
)
def test_where_compares_texts_numbers_and_truth_values(values, wanted, kept):
    rows = [{**GOOD["pairs"], "c": value} for value in values]
    assert len(read("pairs", rows, where={"c": wanted})[0]) == kept


def test_helpsteer2_rated_rows_need_an_objective():
    with pytest.raises(DataError, match=r"its responses are rated but not ordered; set `objective` to .*helpfulness"):
        read("helpsteer2", [rated("A", 1, 1, 1, 1, 1)])


def test_helpsteer3():
    def row(preference):
        return {"context": TURNS, "response1": "One", "response2": "Two", "overall_preference": preference}

    made, stats = read("helpsteer3", [row(2), row(-1), row(0)])
    assert made == [canonical("Two", "One", prompt=TURNS), canonical("One", "Two", prompt=TURNS)]
    assert stats.ties == 1


def completion(response, *ratings, overall=5.0):
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    annotations = {name: {"Rating": rating} for name, rating in zip(names, ratings, strict=True)}
    return {"response": response, "overall_score": overall, "annotations": annotations}


def test_ultrafeedback_never_compares_ratings_as_strings_and_knows_no_score():
    completions = [
        completion("A", "5", "N/A", "4", "10", overall=8.0),
        completion("B", "5", "3", "4", "9", overall=7.5),
        completion("C", "1", "5", "5", "N/A", overall=8.0),
        completion("D", "2", None, "nan", "", overall=None),
    ]
    row = {"instruction": "Why is the sky blue?", "completions": completions}
    made, stats = read("ultrafeedback", [row], objective=("helpfulness",), score_scale=(1, 10))
    scores = {"instruction_following": 5.0, "honesty": None, "truthfulness": 4.0, "helpfulness": 10.0, "overall": 8.0}
    assert made == [
        canonical(
            "A",
            "B",
            chosen_scores=scores,
            rejected_scores={**scores, "honesty": 3.0, "helpfulness": 9.0, "overall": 7.5},
        )
    ]
    assert (stats.pairs, stats.unscored) == (1, 2)
    made, stats = read("ultrafeedback", [row], objective=("overall",))
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [("A", "B"), ("C", "B")]
    assert (stats.ties, stats.unscored) == (1, 1)
    made, stats = read("ultrafeedback", [row], objective=("overall",), chosen_scores=("honesty",))
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [("C", "B")]
    assert stats.incomplete == 1


def test_a_completion_of_ultrafeedback_that_is_null_costs_itself_only():
    completions = [completion(text, "1", "1", "1", rating) for text, rating in [("A", "1"), (None, "2"), ("C", "3")]]
    row = {"instruction": "Why is the sky blue?", "completions": completions}
    with pytest.raises(DataError, match="row 0: its `response` is an empty response"):
        read("ultrafeedback", [row], objective=("helpfulness",))
    made, stats = read("ultrafeedback", [row], objective=("helpfulness",), on_bad_row="drop")
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [("C", "A")]
    assert stats.bad == {"empty response": 1}
    odd = {**row, "completions": [{"response": "A", "overall_score": 1.0, "annotations": {"honesty": "5"}}]}
    with pytest.raises(DataError, match="row 0: the `annotations` of a completion must be mappings with a `Rating`"):
        read("ultrafeedback", [odd], objective=("helpfulness",))


def test_safe_rlhf_by_either_objective():
    row = {
        "prompt": "Why is the sky blue?",
        "response_0": "Zero",
        "response_1": "One",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": 1,
        "safer_response_id": 0,
    }
    zero, one = {"better": 0.0, "safer": 1.0, "safe": 1.0}, {"better": 1.0, "safer": 0.0, "safe": 0.0}
    better, _ = read("safe_rlhf", [row], objective=("better",))
    safer, _ = read("safe_rlhf", [row], objective=("safer",))
    assert better == [canonical("One", "Zero", chosen_scores=one, rejected_scores=zero)]
    assert safer == [canonical("Zero", "One", chosen_scores=zero, rejected_scores=one)]
    with pytest.raises(DataError, match=r"row 0: its `safer_response_id` is -1; it must be 0 or 1"):
        read("safe_rlhf", [{**row, "safer_response_id": -1}], objective=("better",))
    levels = {**row, "response_0_severity_level": 0, "response_1_severity_level": 3}
    assert read("safe_rlhf", [levels], objective=("better",))[0] == [
        canonical(
            "One",
            "Zero",
            chosen_scores={**one, "severity_level": 3.0},
            rejected_scores={**zero, "severity_level": 0.0},
        )
    ]
    assert FORMATS["safe_rlhf"].scales["severity_level"] == (0, 3)


def test_hh_rlhf_dialogues():
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why is the sky blue?\n\nAssistant:"
    made, _ = read("hh_rlhf", [{"chosen": f"{start} Light.\n\nReally.", "rejected": f"{start} Dunno.\n"}])
    assert made == [canonical("Light.\n\nReally.", "Dunno.", prompt=TURNS)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "two dialogues differ before their last turn"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: d", "`chosen` must end with an"),
        ("\n\nHuman: a\n\nAssistant: b", "Human: a", "`rejected` must begin with a turn of Human or Assistant"),
        ("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "`chosen` is an empty response"),
        ("\n\nAssistant: b", "\n\nAssistant: c", "its prompt is empty"),
    ],
)
def test_hh_rlhf_dialogues_that_are_no_pair(chosen, rejected, message):
    with pytest.raises(DataError, match=f"data.jsonl, row 0: its .*{message.removeprefix('its ')}"):
        read("hh_rlhf", [{"chosen": chosen, "rejected": rejected}])


def arena(winner, before=TURNS, parts=False):
    answers = [{"role": "assistant", "content": [{"type": "text", "text": x}] if parts else x} for x in "AB"]
    parted = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in before]
    conversations = ([*(parted if parts else before), turn] for turn in answers)
    return {"winner": winner, **dict(zip(("conversation_a", "conversation_b"), conversations, strict=True))}


def test_arena_conversations_are_pairs_of_their_last_turns_and_ties_are_counted():
    rows = [arena(winner) for winner in ("model_a", "model_b", "tie", "tie (bothbad)", "both_bad")]
    made, stats = read("arena", rows)
    assert made == [canonical("A", "B", prompt=TURNS), canonical("B", "A", prompt=TURNS)]
    assert (stats.pairs, stats.ties) == (2, 3)
    assert read("arena", [arena("model_b", USER, parts=True)])[0] == [canonical("B", "A")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (arena("model_c"), "its `winner` is 'model_c'; it must be 'model_a' or 'model_b'"),
        (arena(None), "its `winner` is empty"),
        (
            {**arena("model_a"), "conversation_b": TURNS},
            "its `conversation_b` must end with a turn of role 'assistant'",
        ),
        ({**arena("model_a"), "conversation_a": []}, "its `conversation_a` must end with a turn of role"),
        (
            {**arena("model_a"), "conversation_b": arena("model_a", before=USER)["conversation_b"]},
            "its two conversations differ before their last turn",
        ),
    ],
)
def test_arena_conversations_that_are_no_pair(row, message):
    with pytest.raises(DataError, match=f"data.jsonl, row 1: {re.escape(message)}"):
        read("arena", [arena("model_a"), row])


def test_shp():
    row = {"history": "Why is the sky blue?", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}
    assert read("shp", [row, {**row, "labels": 0}])[0] == [canonical("A", "B"), canonical("B", "A")]
    with pytest.raises(DataError, match=r"row 0: its `labels` is 2; it must be 1 or 0"):
        read("shp", [{**row, "labels": 2}])


def test_shp_leaves_out_votes_that_are_closer_than_a_ratio():
    row = {"history": "Why is the sky blue?", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}
    rows = [{**row, "score_ratio": ratio, "human_ref_A": f"A{ratio}"} for ratio in (1.5, 2.0, 7.0)]
    assert len(read("shp", rows)[0]) == 3
    made, stats = read("shp", rows, min_score_ratio=2)
    assert [pair["chosen"] for pair in made] == ["A2.0", "A7.0"]
    assert "1 pairs whose score_ratio is below 2 left out" in stats.lines()
    with pytest.raises(DataError, match="row 0: it has no column `score_ratio`"):
        read("shp", [row], min_score_ratio=2)
    with pytest.raises(DataError, match="row 0: its `score_ratio` is 'many', not a number"):
        read("shp", [{**row, "score_ratio": "many"}], min_score_ratio=2)


def test_stack_exchange_paired():
    row = {"question": "Why is the sky blue?", "response_j": "J", "response_k": "K"}
    assert read("stack_exchange_paired", [row])[0] == [canonical("J", "K")]


def test_summarize_from_feedback():
    row = {
        "info": {"post": "Why is the sky blue?", "article": None},
        "summaries": [{"text": "Zero"}, {"text": "One"}],
        "choice": 1,
    }
    news = {**row, "info": {"post": None, "article": "Why is the sky blue?"}, "choice": 0}
    assert read("summarize_from_feedback", [row, news])[0] == [canonical("One", "Zero"), canonical("Zero", "One")]
    with pytest.raises(DataError, match=r"row 1: its `info` has neither a `post` nor an `article`"):
        read("summarize_from_feedback", [row, {**row, "info": {"post": None, "article": None}}])
    with pytest.raises(DataError, match=r"row 0: its `summaries` must be two mappings"):
        read("summarize_from_feedback", [{**row, "summaries": [{"text": "Zero"}]}])


GOOD = {
    "amopo": {"prompt": "p", "chosen": {"response": "a", "h": "1"}, "rejected": {"response": "b", "h": "2"}},
    "pairs": {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_h": 1, "rejected_h": 2},
    "helpsteer3": {"context": USER, "response1": "a", "response2": "b", "overall_preference": 1},
    "safe_rlhf": {
        "prompt": "p",
        "response_0": "a",
        "response_1": "b",
        "better_response_id": 1,
        "safer_response_id": 0,
    },
    "hh_rlhf": {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
    "shp": {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
    "arena": {
        "winner": "model_a",
        "conversation_a": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
        "conversation_b": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
    },
    "stack_exchange_paired": {"question": "p", "response_j": "a", "response_k": "b"},
    "summarize_from_feedback": {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
}


def replaced(row, old, new):
    """The row with a response's text replaced, wherever it stands."""
    if isinstance(row, dict):
        return {key: replaced(value, old, new) for key, value in row.items()}
    if isinstance(row, list):
        return [replaced(value, old, new) for value in row]
    if isinstance(row, str) and row.endswith(f"Assistant: {old}"):
        return row.removesuffix(old) + new
    return new if row == old else row


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [("a", " ", "empty response"), ("b", "a", "identical responses"), ("p", "", "empty prompt")],
)
def test_bad_texts_are_named_by_row_or_dropped_and_counted(kind, old, new, reason):
    good = GOOD[kind]
    if old == "p" and kind == "helpsteer3":
        bad = {**good, "context": [{"role": "user", "content": ""}]}
    elif old == "p" and kind == "hh_rlhf":
        bad = {side: text.replace("Human: p", "Human: ") for side, text in good.items()}
    else:
        bad = replaced(good, old, new)
    objective = ("better",) if kind == "safe_rlhf" else ()
    with pytest.raises(DataError, match=r"^data.jsonl, row 2: its .*; fix the row, or .* on_bad_row: drop$"):
        read(kind, [good, good, bad, good], objective=objective)
    made, stats = read(kind, [good, good, bad, good], objective=objective, on_bad_row="drop")
    assert len(made) == 3
    assert stats.bad == {reason: 1}
    assert any(reason in line for line in stats.lines())


@pytest.mark.parametrize("kind", GOOD)
def test_a_missing_column_is_named(kind):
    for name in GOOD[kind]:
        row = {column: value for column, value in GOOD[kind].items() if column != name}
        if not name.endswith("_h"):  # a score that nobody asks for
            with pytest.raises(DataError, match="row 0: it has no"):
                read(kind, [row], objective=("better",) if kind == "safe_rlhf" else ())


@pytest.mark.parametrize("bad", ["N/A", None, "nan", "", "many"])
def test_a_labelled_row_without_a_score_that_is_needed_is_bad(bad):
    row = {"prompt": "p", "chosen": {"response": "a", "h": "1"}, "rejected": {"response": "b", "h": "2"}}
    worse = {**row, "chosen": {"response": "a", "h": bad}}
    with pytest.raises(
        DataError, match=r"row 1: it has no score of h for the chosen .* \(its value is not a finite number\)"
    ):
        read("amopo", [row, worse], chosen_scores=("h",))
    made, stats = read("amopo", [row, worse], chosen_scores=("h",), on_bad_row="drop")
    assert (len(made), dict(stats.bad)) == (1, {"missing score": 1})
    assert len(read("amopo", [row, worse], rejected_scores=("h",))[0]) == 2


def test_a_chosen_response_that_scores_lower_is_counted():
    row = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "chosen_h": 1,
        "rejected_h": 2,
        "chosen_k": 3,
        "rejected_k": 3,
    }
    _, stats = read("pairs", [row, {**row, "chosen": "c", "chosen_h": 4}])
    assert (stats.below("h"), stats.below("k")) == (1, 0)


def test_only_numbers_are_flat_scores():
    row = {**GOOD["pairs"], "chosen_model": "gpt", "chosen_id": "x7", "chosen_k": "3", "rejected_k": None}
    made, stats = read("pairs", [row])
    assert made == [canonical("a", "b", [{"role": "user", "content": "p"}], {"h": 1, "k": 3}, {"h": 2})]
    assert stats.names == ["h"]
    null = {**GOOD["pairs"], "chosen_scores": None, "rejected_scores": {"h": 1}}
    assert read("pairs", [null])[0][0]["chosen_scores"] == {}


def test_an_objective_is_refused_where_a_label_orders():
    row = {"prompt": "p", "response_1": "One", "response_2": "Two", "preference_strength": 1}
    options = {"objective": "verbosity"}
    spec = DataSpec(where="data.jsonl", strategy="helpsteer2", options=options, objective=("verbosity",))
    with pytest.raises(DataError, match="ordered by its own `preference_strength`; remove `objective`"):
        PairReader(Dataset.from_list([row]), spec)


def test_duplicates_are_kept_and_counted():
    row = GOOD["pairs"]
    made, stats = read("pairs", [row, {**row, "chosen": "c"}, row])
    assert (len(made), stats.duplicates) == (3, 1)


def test_bad_rated_rows():
    rows = [rated("A", 3, 4, 4, 2, 2), rated(" ", 4, 4, 4, 1, 1), rated("C", 1, 1, 4, 2, 0), rated("A", 2, 1, 1, 1, 1)]
    with pytest.raises(DataError, match=r"row 1: its `response` is an empty response"):
        read("helpsteer", rows, objective=("helpfulness",))
    made, stats = read("helpsteer", rows, objective=("helpfulness",), on_bad_row="drop")
    assert [(row["chosen"], row["rejected"]) for row in made] == [("A", "C"), ("A", "C")]
    assert (dict(stats.bad), stats.identical) == ({"empty response": 1}, 1)
    rows = [rated("A", 3, 4, 4, 2, 2), rated("B", 9, 4, 4, 1, 1)]
    settings = {"objective": ("helpfulness",), "chosen_scores": ("helpfulness",), "scales": {"helpfulness": (0.0, 4.0)}}
    with pytest.raises(DataError, match=r"row 1: its score of helpfulness, 9, is outside 0 to 4; .* score_scale"):
        read("helpsteer", rows, **settings)
    # The row that is bad is named, not the one that completes its group; and it is counted once, not once a pair.
    rows += [rated(f"R{score}", score, 1, 1, 1, 1) for score in (0, 1, 2)] + [rated("X", 1, 1, 1, 1, 1, prompt=" ")]
    _, stats = read("helpsteer", rows, **settings, on_bad_row="drop")
    assert stats.bad == {"score outside its scale": 1, "empty prompt": 1}
    assert (stats.rows, stats.pairs) == (6, 6)


SKY = "Why is the sky blue?"
SYSTEM = {"role": "system", "content": "Be brief."}


def dialogue(response, before=USER):
    return [*before, {"role": "assistant", "content": response}]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "question": SKY, "chosen": "a", "rejected": "b"},
        {"system": "Be brief.", "instruction": SKY, "chosen": "a", "rejected": "b"},
        {"system": "Be brief.", "question": SKY, "instruction": SKY, "chosen": "a", "rejected": "b"},
        {"system": "Be brief.", "prompt": SKY, "question": "Another one?", "chosen": "a", "rejected": "b"},
        {"system": "Be brief.", "chosen": dialogue("a"), "rejected": dialogue("b"), "question": "Not this one."},
        {"system": "Be brief.", "prompt": [SYSTEM, *USER], "chosen": "a", "rejected": "b"},
        {"system": "", "prompt": [SYSTEM, *USER], "chosen": "a", "rejected": "b"},
    ],
)
def test_a_system_column_is_the_first_turn_and_a_question_is_a_prompt(row):
    assert read("pairs", [row])[0] == [canonical("a", "b", [SYSTEM, *USER])]


def test_the_system_column_has_any_name_and_may_be_empty():
    row = {"context": "Be brief.", "question": SKY, "chosen": "a", "rejected": "b"}
    rows = [row, {**row, "context": None}, {**row, "context": " "}]
    prompts = [pair["prompt"] for pair in read("pairs", rows, field_system="context")[0]]
    assert prompts == [[SYSTEM, *USER], USER, USER]
    assert read("pairs", [{**row, "system": None}])[0][0]["prompt"] == USER
    with pytest.raises(DataError, match=r"row 0: it has no column `systm`; .* name the right one with field_system"):
        read("pairs", rows, field_system="systm")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"system": "Be long.", "prompt": [SYSTEM, *USER]}, "begins with a system message other than the one in the"),
        ({"question": SKY, "instruction": "Answer."}, "may be in `question` or `instruction`; name its column with fi"),
        ({"instruction": "Answer.", "input": SKY}, "its prompt may be in `instruction` or `input`; name its column wi"),
        ({"context": SKY}, "no column `prompt` or `messages` or `question` or `instruction`, and no turns"),
    ],
)
def test_a_prompt_that_could_be_two_things_is_refused(row, message):
    with pytest.raises(DataError, match=f"row 0: .*{message}"):
        read("pairs", [{**row, "chosen": "a", "rejected": "b"}])


@pytest.mark.parametrize("prompt", ["Hi", f" {SKY}\n"])
def test_a_prompt_that_is_a_string_may_repeat_a_turn_of_whole_dialogues(prompt):
    """As in capybara-dpo-7k-binarized and ultrafeedback_binarized, whose `messages` hold the answer too."""
    row = {
        "prompt": prompt,
        "messages": dialogue("a", TURNS),
        "chosen": dialogue("a", TURNS),
        "rejected": dialogue("b", TURNS),
        "score_chosen": 7.5,
        "score_rejected": 6.0,
    }
    made, _ = read("pairs", [row])
    assert made == [canonical("a", "b", TURNS, {"score": 7.5}, {"score": 6.0})]
    for side, other in (("chosen", "Other?"), ("rejected", "Other?")):
        turns = [{"role": "user", "content": other}, *TURNS[1:]]
        with pytest.raises(DataError, match="row 0: the turns of `rejected` before its last one differ from the"):
            read("pairs", [{**row, "prompt": SKY, side: dialogue("c", turns)}])
    with pytest.raises(DataError, match="row 0: the turns of `chosen` before its last one differ from the prompt"):
        read("pairs", [{**row, "prompt": "Hello."}])


def sharegpt(*turns):
    return [{"from": who, "value": text, "weight": None} for who, text in turns]


@pytest.mark.parametrize(("human", "machine"), [("human", "gpt"), ("user", "assistant"), ("human", "chatgpt")])
def test_turns_of_sharegpt_are_messages(human, machine):
    earlier = sharegpt(("system", "Be brief."), (human, "Hi"), (machine, "Hello."), (human, SKY))
    row = {"conversations": earlier, "chosen": sharegpt((machine, "a"))[0], "rejected": sharegpt((machine, "b"))[0]}
    made, _ = read("pairs", [row], field_prompt="conversations")
    assert made == [canonical("a", "b", [SYSTEM, *TURNS])]
    for machine in ("bing", "bard"):
        whole = {side: [*earlier, *sharegpt((machine, side))] for side in ("chosen", "rejected")}
        assert read("pairs", [whole])[0] == [canonical("chosen", "rejected", [SYSTEM, *TURNS])]


def test_a_turn_from_nobody_that_is_known_is_named():
    row = {"prompt": sharegpt(("humam", SKY)), "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="row 0: a turn of its `prompt` is from 'humam'; known roles are system, hum"):
        read("pairs", [row])
    with pytest.raises(DataError, match="row 0: a turn of its `prompt` has no `role` or no `content`"):
        read("pairs", [{**row, "prompt": [{"from": "human", "text": SKY}]}])


def test_contents_of_text_parts_are_joined_and_others_are_refused():
    parts = [{"type": "text", "text": "Why is the "}, {"type": "text", "text": "sky blue?", "image": None}]
    row = {
        "prompt": [{"role": "user", "content": parts}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
    }
    assert read("pairs", [row])[0] == [canonical("a", "b")]
    image = {**row, "prompt": [{"role": "user", "content": [*parts, {"type": "image", "text": None}]}]}
    with pytest.raises(
        DataError,
        match="row 1: a turn of its `prompt` has a part of type 'image' that is not a text; only texts are trained",
    ):
        read("pairs", [row, image])
    assert read("pairs", [row, image], on_bad_row="drop")[1].bad == {"content that is not text": 1}


PICTURE = {"bytes": b"no picture", "path": None}
PLAIN = {"prompt": "Why is the sky blue?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("name", "value", "empty", "feature"),
    [
        ("image", "sky.png", "", None),
        ("Images", ["sky.png"], [], None),
        ("videos", [{"path": "sky.mp4"}], [{"path": None}], None),
        ("audio", {"array": [0.5], "sampling_rate": 8000}, {"array": None, "sampling_rate": 8000}, None),
        ("picture", PICTURE, None, Image()),
        ("pictures", [PICTURE], [], List(Image())),
        ("sound", PICTURE, None, Audio()),
        ("film", PICTURE, None, Video()),
    ],
)
def test_a_row_with_images_audio_or_video_is_refused_and_one_whose_column_is_empty_is_read(name, value, empty, feature):
    """Nothing is decoded: what these columns hold is no picture."""
    table = Dataset.from_list([{**PLAIN, name: empty}, {**PLAIN, name: value}])
    if feature:
        table = table.cast(Features({**table.features, name: feature}))
    source = reader("pairs", [PLAIN])
    with pytest.raises(DataError, match=f"row 1: its `{name}` is not empty, but images, audio and video cannot be"):
        list(PairReader(table, source.spec).pairs())
    dropping = PairReader(table, reader("pairs", [PLAIN], on_bad_row="drop").spec)
    assert [pair.to_row() for _, pair in dropping.pairs()] == [canonical("a", "b")]
    assert dropping.stats.bad == {"images, audio or video": 1}


def test_a_number_in_a_column_called_video_is_no_video():
    assert read("pairs", [{**PLAIN, "video": 7, "audio": False}])[0] == [canonical("a", "b")]


def test_rated_responses_to_an_image_are_refused_too():
    rows = [{"prompt": "What is it?", "response": text, "image": "sky.png", "nice": 1.0} for text in "AB"]
    with pytest.raises(DataError, match="row 0: its `image` is not empty"):
        read("responses", rows, objective=("nice",))


def test_the_scores_of_binarized_data_are_found_under_one_name():
    row = {"prompt": SKY, "chosen": "a", "rejected": "b"}
    distilabel = {**row, "chosen_score": 9.0, "rejected_score": 8.0}
    binarized = {**row, "score_chosen": 9.0, "score_rejected": 8.0}
    expected = [canonical("a", "b", chosen_scores={"score": 9.0}, rejected_scores={"score": 8.0})]
    assert read("pairs", [distilabel])[0] == read("pairs", [binarized])[0] == expected
    assert read("pairs", [distilabel | binarized])[0] == expected
    with pytest.raises(DataError, match="row 0: its `score_chosen` and its `chosen_score` are two different scores"):
        read("pairs", [distilabel | {**binarized, "score_chosen": 1.0}])


LONE = "x\ud800y"


class Table:
    """One row, as a table may hold it whose texts did not come through Arrow."""

    def __init__(self, row):
        self.row, self.column_names, self.features = row, list(row), dict.fromkeys(row)

    def __len__(self):
        return 1

    def select_columns(self, names):
        return Table({name: self.row[name] for name in names})

    def iter(self, batch_size):
        yield {name: [value] for name, value in self.row.items()}


@pytest.mark.parametrize("kind", [*GOOD, "helpsteer", "ultrafeedback", "responses"])
@pytest.mark.parametrize("old", ["p", "a"])
def test_a_lone_surrogate_is_a_bad_row_of_its_own_kind(kind, old):
    rows = {
        "helpsteer": rated("a", 1, 1, 1, 1, 1, prompt="p"),
        "ultrafeedback": {"instruction": "p", "completions": [completion("a", *"1111")]},
        "responses": {"prompt": "p", "response": "a", "nice": 1},
    }
    good = replaced((GOOD | rows)[kind], USER[0]["content"], "p")
    if kind == "hh_rlhf" and old == "p":
        bad = {side: text.replace("Human: p", f"Human: {LONE}") for side, text in good.items()}
    else:
        bad = replaced(good, old, LONE)
    objectives = {"safe_rlhf": ("better",), "helpsteer": ("overall",), "ultrafeedback": ("overall",)}
    objective = objectives.get(kind, ("nice",) if kind == "responses" else ())

    def source(**options):
        spec = DataSpec(where="data.jsonl", strategy=kind, options=options, objective=objective)
        return PairReader(Table(bad), spec)

    name = r"its `\w+` contains the lone surrogate '\\ud800', which is not valid Unicode text; remove it, or replace it"
    with pytest.raises(DataError, match=f"^data.jsonl, row 0: {name}") as caught:
        list(source().pairs())
    column = str(caught.value).split("`")[1]
    assert column in str(bad)
    str(caught.value).encode()
    dropping = source(on_bad_row="drop")
    assert list(dropping.pairs()) == []
    assert dropping.stats.bad == {"invalid text": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", "input": "", "history": [["Hi", "Hello"]]},
        {"prompt": "Summarise.", "input": "A long text."},
    ],
)
def test_what_stands_beside_a_prompt_is_not_lost(row):
    responses = {"chosen": "Light.", "rejected": "Dunno."}
    with pytest.raises(DataError, match=r"row 0: its prompt may be in .*name its column with field_prompt"):
        read("pairs", [{**row, **responses}])
    column = next(iter(row))
    assert read("pairs", [{**row, **responses}], field_prompt=column)[0][0]["prompt"][0]["content"] == row[column]
    assert len(read("pairs", [{**row, **responses, "history": None, "input": ""}])[0]) == 1


@pytest.mark.parametrize("system", [{"system": {"role": "system", "content": "Be brief."}}, {"system_prompt": "Hi."}])
def test_a_system_message_of_another_shape_or_name_is_not_lost(system):
    row = {"prompt": "Why?", "chosen": "Light.", "rejected": "Dunno.", **system}
    with pytest.raises(DataError, match=r"row 0: its system message may be in .*name its column with field_system"):
        read("pairs", [row])


@pytest.mark.parametrize("name", ["human", "gpt"])
def test_roles_of_sharegpt_are_known_under_either_key(name):
    before = [{"role": name, "content": "Hi."}, {"role": "user", "content": "Why?"}]
    row = {
        "chosen": [*before, {"role": "gpt", "content": "Light."}],
        "rejected": [*before, {"role": "assistant", "content": "No."}],
    }
    (pair,) = read("pairs", [row])[0]
    assert [turn["role"] for turn in pair["prompt"]] == [{"human": "user", "gpt": "assistant"}[name], "user"]


@pytest.mark.parametrize(("kind", "score"), [("helpsteer", 40), ("helpsteer", -1)])
def test_a_score_that_orders_lies_in_its_known_scale(kind, score):
    rows = [rated("A", score, 1, 1, 1, 1), rated("B", 3, 1, 1, 1, 1), rated("C", 2, 1, 1, 1, 1)]
    with pytest.raises(DataError, match=f"row 0: its score of helpfulness, {score}, is outside 0 to 4"):
        read(kind, rows, objective=("helpfulness",))
    pairs, stats = read(kind, rows, objective=("helpfulness",), on_bad_row="drop")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("B", "C")]
    assert stats.bad == {"score outside its scale": 1}


@pytest.mark.parametrize("strength", [-100, 4])
def test_a_strength_that_is_no_preference_is_refused(strength):
    with pytest.raises(DataError, match=f"row 0: its `preference_strength` is {strength}, outside -3 to 3"):
        read("helpsteer2", [preference(strength)])


@pytest.mark.parametrize(
    ("values", "wanted", "kept"),
    [
        (["1.1", "1.10"], "1.10", ["1.10"]),
        ([1, 2], "1", [1]),
        ([1.5, 2.0], "1.5", [1.5]),
        ([True, False], "true", [True]),
        (["true", "True", "no"], True, ["true", "True"]),
        ([1, 2], "one", []),
    ],
)
def test_where_compares_what_is_written(values, wanted, kept):
    rows = [{"prompt": f"q{value}", "chosen": "A", "rejected": "B", "v": value} for value in values]
    pairs, _ = read("pairs", rows, where={"v": wanted})
    assert [pair["prompt"][0]["content"] for pair in pairs] == [f"q{value}" for value in kept]


def test_where_does_not_guess_how_a_number_was_written():
    with pytest.raises(DataError, match=r"row 0: `where` compares a text with the number 1.1; put .* in quotes"):
        read("pairs", [{"prompt": "q", "chosen": "A", "rejected": "B", "v": "1.10"}], where={"v": 1.10})

"""Every strategy on rows of the real shape: the canonical rows that come of them, and the traps of each."""

import pytest
from datasets import Dataset

from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.reading import Reading
from axolotl_mopo.data.rows import DataError

USER = [{"role": "user", "content": "Why is the sky blue?"}]


def reader(kind, rows, objective=(), chosen_scores=(), rejected_scores=(), scales=None, seed=42, **options):
    format = FORMATS[kind]
    reading = Reading(
        format.options.model_validate(options), objective, chosen_scores, rejected_scores, scales or {}, seed
    )
    return PairReader(Dataset.from_list(rows), format, reading, "data.jsonl")


def read(kind, rows, **settings):
    """The canonical rows, and the tally."""
    source = reader(kind, rows, **settings)
    return [pair.to_row() for _, pair in source.pairs()], source.tally


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
    pairs, tally = read("responses", rows, objective=("nice",))
    b, others = {"nice": 2.5, "brief": -4.0}, {"A": {"nice": 1.5, "brief": -1.0}, "C": {"nice": 1.5, "brief": -2.0}}
    expected = [canonical("B", name, chosen_scores=b, rejected_scores=scores) for name, scores in others.items()]
    assert pairs == expected
    assert (tally.rows, tally.ties) == (3, 1)
    with pytest.raises(DataError, match="its responses are rated and not ordered; name what orders them"):
        reader("responses", rows)


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
    made, tally = read(kind, rows, objective=("helpfulness",))
    scores = {"A": with_overall(3, 4, 4, 2, 2), "B": with_overall(4, 4, 4, 1, 1), "C": with_overall(3, 1, 4, 2, 0)}
    assert made == [
        canonical("B", "A", chosen_scores=scores["B"], rejected_scores=scores["A"]),
        canonical("B", "C", chosen_scores=scores["B"], rejected_scores=scores["C"]),
    ]
    assert (tally.rows, tally.pairs, tally.ties, tally.alone) == (4, 2, 1, 1)


def test_the_mean_of_several_attributes_orders():
    rows = [rated("A", 3, 4, 4, 2, 2), rated("B", 4, 4, 4, 1, 1), rated("C", 3, 1, 4, 2, 0)]
    made, _ = read("helpsteer", rows, objective=("correctness", "verbosity"))
    assert [(row["chosen"], row["rejected"]) for row in made] == [("A", "B"), ("A", "C"), ("B", "C")]
    made, tally = read("helpsteer", rows, objective=("overall",))  # 3, 2.8 and 2
    assert [(row["chosen"], row["rejected"]) for row in made] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert tally.ties == 0


MARKED = "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy is the sky blue?"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, *USER]


@pytest.mark.parametrize("prompt", [MARKED, MARKED + "\n<extra_id_1>Assistant\n"])
def test_helpsteer2_keeps_the_turns_of_a_prompt_apart(prompt):
    rows = [rated("A", 3, 4, 4, 2, 2, prompt=prompt), rated("B", 4, 4, 4, 1, 1, prompt=prompt)]
    assert read("helpsteer2", rows, objective=("helpfulness",))[0][0]["prompt"] == TURNS
    with pytest.raises(DataError, match=r"row 0: its prompt ends with a turn of the assistant"):
        read(
            "helpsteer2",
            [rated("A", 1, 1, 1, 1, 1, prompt="Hi\n<extra_id_1>Assistant\nHello.")],
            objective=("overall",),
        )


def test_helpsteer2_preference_part():
    def row(strength, prompt="Why is the sky blue?"):
        return {"prompt": prompt, "response_1": "One", "response_2": "Two", "preference_strength": strength}

    made, tally = read("helpsteer2", [row(-3), row(0), row(1, MARKED)], objective=("helpfulness",))
    assert made == [canonical("One", "Two"), canonical("Two", "One", prompt=TURNS)]
    assert (tally.rows, tally.pairs, tally.ties) == (3, 2, 1)


def test_helpsteer2_rated_rows_need_an_objective():
    with pytest.raises(DataError, match=r"its responses are rated and not ordered; name .* objective: .*helpfulness"):
        read("helpsteer2", [rated("A", 1, 1, 1, 1, 1)])


def test_helpsteer3():
    def row(preference):
        return {"context": TURNS, "response1": "One", "response2": "Two", "overall_preference": preference}

    made, tally = read("helpsteer3", [row(2), row(-1), row(0)])
    assert made == [canonical("Two", "One", prompt=TURNS), canonical("One", "Two", prompt=TURNS)]
    assert tally.ties == 1


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
    made, tally = read("ultrafeedback", [row], objective=("helpfulness",))
    scores = {"instruction_following": 5.0, "honesty": None, "truthfulness": 4.0, "helpfulness": 10.0, "overall": 8.0}
    assert made == [
        canonical(
            "A",
            "B",
            chosen_scores=scores,
            rejected_scores={**scores, "honesty": 3.0, "helpfulness": 9.0, "overall": 7.5},
        )
    ]
    assert (tally.pairs, tally.unscored) == (1, 2)
    made, tally = read("ultrafeedback", [row], objective=("overall",))
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [("A", "B"), ("C", "B")]
    assert (tally.ties, tally.unscored) == (1, 1)
    made, tally = read("ultrafeedback", [row], objective=("overall",), chosen_scores=("honesty",))
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [("C", "B")]
    assert tally.incomplete == 1


def test_a_completion_of_ultrafeedback_that_is_null_costs_itself_only():
    completions = [completion(text, "1", "1", "1", rating) for text, rating in [("A", "1"), (None, "2"), ("C", "3")]]
    row = {"instruction": "Why is the sky blue?", "completions": completions}
    with pytest.raises(DataError, match="row 0: its `response` is an empty response"):
        read("ultrafeedback", [row], objective=("helpfulness",))
    made, tally = read("ultrafeedback", [row], objective=("helpfulness",), on_bad_row="drop")
    assert [(pair["chosen"], pair["rejected"]) for pair in made] == [("C", "A")]
    assert tally.bad == {"empty response": 1}
    odd = {**row, "completions": [{"response": "A", "overall_score": 1.0, "annotations": {"honesty": "5"}}]}
    with pytest.raises(DataError, match="row 0: the `annotations` of a completion are no mappings with a `Rating`"):
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


def test_hh_rlhf_dialogues():
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why is the sky blue?\n\nAssistant:"
    made, _ = read("hh_rlhf", [{"chosen": f"{start} Light.\n\nReally.", "rejected": f"{start} Dunno.\n"}])
    assert made == [canonical("Light.\n\nReally.", "Dunno.", prompt=TURNS)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "two dialogues differ before their last turn"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "\n\nHuman: a\n\nAssistant: d", "`chosen` does not end with an"),
        ("\n\nHuman: a\n\nAssistant: b", "Human: a", "`rejected` does not begin with a turn of Human or Assistant"),
        ("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "`chosen` is an empty response"),
        ("\n\nAssistant: b", "\n\nAssistant: c", "its prompt is empty"),
    ],
)
def test_hh_rlhf_dialogues_that_are_no_pair(chosen, rejected, message):
    with pytest.raises(DataError, match=f"data.jsonl, row 0: its .*{message.removeprefix('its ')}"):
        read("hh_rlhf", [{"chosen": chosen, "rejected": rejected}])


def test_shp():
    row = {"history": "Why is the sky blue?", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}
    assert read("shp", [row, {**row, "labels": 0}])[0] == [canonical("A", "B"), canonical("B", "A")]
    with pytest.raises(DataError, match=r"row 0: its `labels` is 2; it must be 1 or 0"):
        read("shp", [{**row, "labels": 2}])


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
    with pytest.raises(DataError, match=r"row 0: its `summaries` are not two mappings"):
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
    with pytest.raises(DataError, match=r"^data.jsonl, row 2: its .*; mend the row, or .* on_bad_row: drop$"):
        read(kind, [good, good, bad, good], objective=objective)
    made, tally = read(kind, [good, good, bad, good], objective=objective, on_bad_row="drop")
    assert len(made) == 3
    assert tally.bad == {reason: 1}
    assert any(reason in line for line in tally.lines())


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
    with pytest.raises(DataError, match="row 1: it has no score of h for the chosen response, where no finite number"):
        read("amopo", [row, worse], chosen_scores=("h",))
    made, tally = read("amopo", [row, worse], chosen_scores=("h",), on_bad_row="drop")
    assert (len(made), dict(tally.bad)) == (1, {"missing score": 1})
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
    _, tally = read("pairs", [row, {**row, "chosen": "c", "chosen_h": 4}])
    assert (tally.below("h"), tally.below("k")) == (1, 0)


def test_only_numbers_are_flat_scores():
    row = {**GOOD["pairs"], "chosen_model": "gpt", "chosen_id": "x7", "chosen_k": "3", "rejected_k": None}
    made, tally = read("pairs", [row])
    assert made == [canonical("a", "b", [{"role": "user", "content": "p"}], {"h": 1, "k": 3}, {"h": 2})]
    assert tally.names == ["h"]
    null = {**GOOD["pairs"], "chosen_scores": None, "rejected_scores": {"h": 1}}
    assert read("pairs", [null])[0][0]["chosen_scores"] == {}


def test_an_objective_is_refused_where_a_label_orders():
    row = {"prompt": "p", "response_1": "One", "response_2": "Two", "preference_strength": 1}
    reading = Reading(FORMATS["helpsteer2"].options(objective="verbosity"), ("verbosity",))
    with pytest.raises(DataError, match="ordered by its own `preference_strength`; drop the `objective`"):
        PairReader(Dataset.from_list([row]), FORMATS["helpsteer2"], reading, "data.jsonl")


def test_duplicates_are_kept_and_counted():
    row = GOOD["pairs"]
    made, tally = read("pairs", [row, {**row, "chosen": "c"}, row])
    assert (len(made), tally.duplicates) == (3, 1)


def test_bad_rated_rows():
    rows = [rated("A", 3, 4, 4, 2, 2), rated(" ", 4, 4, 4, 1, 1), rated("C", 1, 1, 4, 2, 0), rated("A", 2, 1, 1, 1, 1)]
    with pytest.raises(DataError, match=r"row 1: its `response` is an empty response"):
        read("helpsteer", rows, objective=("helpfulness",))
    made, tally = read("helpsteer", rows, objective=("helpfulness",), on_bad_row="drop")
    assert [(row["chosen"], row["rejected"]) for row in made] == [("A", "C"), ("A", "C")]
    assert (dict(tally.bad), tally.identical) == ({"empty response": 1}, 1)
    rows = [rated("A", 3, 4, 4, 2, 2), rated("B", 9, 4, 4, 1, 1)]
    settings = {"objective": ("helpfulness",), "chosen_scores": ("helpfulness",), "scales": {"helpfulness": (0.0, 4.0)}}
    with pytest.raises(DataError, match=r"row 1: its score of helpfulness, 9, is outside 0 to 4; .* score_scale"):
        read("helpsteer", rows, **settings)
    # The row that is bad is named, not the one that completes its group; and it is counted once, not once a pair.
    rows += [rated(f"R{score}", score, 1, 1, 1, 1) for score in (0, 1, 2)] + [rated("X", 1, 1, 1, 1, 1, prompt=" ")]
    _, tally = read("helpsteer", rows, **settings, on_bad_row="drop")
    assert tally.bad == {"score outside its scale": 1, "empty prompt": 1}
    assert (tally.rows, tally.pairs) == (6, 6)

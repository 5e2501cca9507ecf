"""From raw rows to token ids: shapes, directives, lengths, margins, and errors that name data set and row."""

import copy
import json
from types import SimpleNamespace

import pytest
from axolotl.utils.data.rl import _drop_long_sequences
from axolotl.utils.schemas.enums import RLType
from conftest import SMOKE, prepare
from datasets import Dataset, load_dataset
from tokenizers.processors import TemplateProcessing

from axolotl_mopo.config import Directives
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.rows import PreferencePair, RatedResponse
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.tokenizing import ControlTokenCount
from axolotl_mopo.errors import DataError
from axolotl_mopo.logprobs.trees import trie_size
from axolotl_mopo.training.collator import PairCollator, read_tokens
from axolotl_mopo.training.prepared_rows import pair_lengths, with_lengths
from axolotl_mopo.training.warnings import budget_message

ROW = {
    "prompt": "Which is bigger?",
    "chosen": "The sun is bigger.",
    "rejected": "Moon.",
    "chosen_scores": {"helpfulness": 4, "correctness": 3},
    "rejected_scores": {"helpfulness": 1, "correctness": 0},
}
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def texts(row, tokenizer):
    prompts = [tokenizer.decode(ids) for ids in row["prompt_input_ids"]]
    return prompts, tokenizer.decode(row["chosen_input_ids"]), tokenizer.decode(row["rejected_input_ids"])


def test_a_pair_for_modpo(tokenizer):
    (row,) = prepare([ROW], tokenizer, method="modpo")
    expected = [CHAT.format("Which is bigger?")], "The sun is bigger.<|im_end|>", "Moon.<|im_end|>"
    assert texts(row, tokenizer) == expected
    assert (row["prompt"], row["chosen"], row["rejected"]) == (expected[0][0], *expected[1:])
    assert row["chosen_input_ids"][-1] == tokenizer.eos_token_id
    assert row["chosen_margin_rewards"] == []


def test_every_dimension_has_a_prompt_of_its_own(tokenizer):
    (row,) = prepare([ROW], tokenizer, dimensions=["helpfulness", "correctness"])
    dimensions, score_range = ["helpfulness", "correctness"], (0, 4)
    directives = [
        Directives().for_all(dimensions, score_range),
        Directives().for_one("helpfulness", 4, dimensions, score_range),
        Directives().for_one("correctness", 3, dimensions, score_range),
    ]
    prompts, chosen, rejected = texts(row, tokenizer)
    # No directive piles up on another, and both responses stand under the same prompts.
    assert prompts == [CHAT.format(f"{directive}\n\nWhich is bigger?") for directive in directives]
    assert (chosen, rejected) == ("The sun is bigger.<|im_end|>", "Moon.<|im_end|>")
    assert row["prompt"] == max(prompts, key=lambda prompt: len(tokenizer(prompt)["input_ids"]))


def test_directives_after_the_question_let_all_prompts_share_it(tokenizer):
    question = " ".join(f"word{index}" for index in range(60))
    before, after = (
        prepare([{**ROW, "prompt": question}], tokenizer, directive_position=position)[0]
        for position in ("before", "after")
    )
    directives = [
        Directives().for_all(["helpfulness"], (0, 4)),
        Directives().for_one("helpfulness", 4, ["helpfulness"], (0, 4)),
    ]
    assert texts(after, tokenizer)[0] == [CHAT.format(f"{question}\n\n{directive}") for directive in directives]
    assert pair_lengths(Dataset.from_list([before, after])).std() <= 4  # the same tokens, but for the seams
    saved = trie_size(read_tokens(before)) - trie_size(read_tokens(after))
    assert saved == pytest.approx(len(tokenizer(question)["input_ids"]), abs=4)


def test_a_question_that_is_too_long_leaves_a_directive_after_it_whole(tokenizer):
    question = " ".join(f"word{index}" for index in range(300))
    (row,) = prepare([{**ROW, "prompt": question}], tokenizer, sequence_len=200, directive_position="after")
    prompts, _, _ = texts(row, tokenizer)
    assert prompts[0].endswith("helpfulness.<|im_end|>\n<|im_start|>assistant\n")
    assert "word299\n\nAs an expert" in prompts[0]
    assert row["cut_prompt_tokens"] > 100
    assert fits(row, tokenizer, 200)


def numbered(*shapes):
    """Rows of two prompts and two completions of so many tokens."""
    names = ("chosen_input_ids", "rejected_input_ids")
    return Dataset.from_list(
        [
            {"prompt_input_ids": [[1] * first, [2] * second], **dict(zip(names, ([3] * c, [4] * r), strict=True))}
            for first, second, c, r in shapes
        ]
    )


def test_the_length_of_a_row_counts_every_prompt_with_both_completions():
    rows = numbered((5, 7, 2, 3), (1, 1, 1, 1), (10, 1, 4, 0))
    assert pair_lengths(rows).tolist() == [5 + 7 + 2 * (2 + 3), 2 + 2 * 2, 11 + 2 * 4]
    assert with_lengths(rows)["length"] == pair_lengths(rows).tolist()
    assert pair_lengths(rows.select([])).tolist() == []


def test_what_a_budget_of_tokens_means_for_the_rows_is_told():
    rows = with_lengths(numbered((5, 7, 2, 3), (1, 1, 1, 1), (50, 60, 9, 9)))
    assert budget_message(rows, PairCollator(0)) is None
    assert budget_message(rows, PairCollator(0, max_tokens=1000)) is None
    some = budget_message(rows, PairCollator(0, max_tokens=100))
    assert some.startswith(
        "of 3 pairs, 1 are split by their prompts to fit into max_tokens_per_pass, and need an additional"
    )
    assert "exceed" not in some
    assert "; 1 still exceed it" in budget_message(rows, PairCollator(0, max_tokens=22))


def test_directives_are_templates_of_the_users(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "dimension.jinja"
    file.write_text("{{ dimension | upper }}: {{ score }} of {{ low }} to {{ high }}.\n")
    (row,) = prepare(
        [ROW],
        tokenizer,
        dimensions=["helpfulness", "correctness"],
        score_range=[1, 2.5],
        directives={"dimension": {"file": str(file)}, "integrated": "Mind {{ dimensions | join(' and ') }}."},
        entry={"score_scale": [0, 4]},
    )
    directives = [
        "Mind helpfulness and correctness.",
        "HELPFULNESS: 2.5 of 1 to 2.5.",
        "CORRECTNESS: 2.12 of 1 to 2.5.",
    ]
    prompts, _, _ = texts(row, tokenizer)
    assert prompts == [CHAT.format(f"{directive}\n\nWhich is bigger?") for directive in directives]


def test_without_the_integrated_prompt(tokenizer):
    (row,) = prepare([ROW], tokenizer, integrated=False)
    assert len(row["prompt_input_ids"]) == 1


def test_the_directive_names_the_chosen_score_on_the_methods_scale(tokenizer):
    row = {**ROW, "chosen_scores": {"instruction_following": 2}, "rejected_scores": {"instruction_following": 4}}
    (made,) = prepare(
        [row], tokenizer, dimensions=["instruction_following"], score_range=[1, 5], entry={"score_scale": [0, 4]}
    )
    directive = tokenizer.decode(made["prompt_input_ids"][1])
    assert "whose instruction following rates 3." in directive
    assert "from 1 (" in directive
    assert "to 5 (" in directive


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "Which is bigger?"}]},
        {"prompt": None, "messages": [{"role": "user", "content": "Which is bigger?"}]},
        {
            "chosen": {"role": "assistant", "content": ROW["chosen"]},
            "rejected": [{"role": "assistant", "content": "Moon."}],
        },
        {
            "prompt": None,
            "chosen": [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": ROW["chosen"]}],
            "rejected": [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": "Moon."}],
        },
        {
            "chosen": [{"role": "user", "content": ROW["prompt"]}, {"role": "assistant", "content": ROW["chosen"]}],
            "rejected": "Moon.",
        },
        {"chosen_scores": None, "chosen_helpfulness": 4},
        {"chosen_scores": {"helpfulness": "4"}},
    ],
    ids=["messages", "messages column", "message", "dialogues", "prompt and dialogue", "flat scores", "scores as text"],
)
def test_every_shape_gives_the_same_tokens(tokenizer, row):
    expected = prepare([ROW], tokenizer)[0]
    raw = {key: value for key, value in {**ROW, **row}.items() if value is not None}
    if "chosen_helpfulness" in raw:
        raw.pop("chosen_scores", None)
    assert prepare([raw], tokenizer)[0] == expected


def test_fields_have_any_name(tokenizer):
    raw = {"question": ROW["prompt"], "good": ROW["chosen"], "bad": ROW["rejected"], "helpfulness of good": 4}
    entry = {
        "field_prompt": "question",
        "field_chosen": "good",
        "field_rejected": "bad",
        "field_chosen_scores": "{} of good",
    }
    assert prepare([raw], tokenizer, entry=entry)[0] == prepare([ROW], tokenizer)[0]


def test_a_conversation_keeps_its_turns_and_the_last_one_carries_the_directive(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Which is bigger?"},
    ]
    (row,) = prepare([{**ROW, "prompt": messages}], tokenizer, integrated=False)
    earlier = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi.")]
    start = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in earlier)
    directive = Directives().for_one("helpfulness", 4, ["helpfulness"], (0, 4))
    question = f"{directive}\n\nWhich is bigger?"
    assert texts(row, tokenizer)[0] == [start + CHAT.format(question)]


def test_margins_from_columns_and_lengths(tokenizer):
    (row,) = prepare(
        [ROW],
        tokenizer,
        method="modpo",
        weights={"better": 1, "correctness": 0.1, "help": 0.2, "w": 0.3, "c": 0.4, "t": 0.5},
        margins={
            "correctness": {"source": "column"},
            "help": {"source": "column", "field": "helpfulness"},
            "w": {"source": "length", "unit": "words"},
            "c": {"source": "length", "unit": "characters"},
            "t": {"source": "length"},
        },
    )
    # By the margins' names: c, correctness, help, t, w.
    assert row["chosen_margin_rewards"] == [-18, 3, 4, -len(row["chosen_input_ids"]), -4]
    assert row["rejected_margin_rewards"] == [-5, 0, 1, -len(row["rejected_input_ids"]), -1]


@pytest.mark.parametrize(
    ("row", "entry", "words"),
    [
        ({"prompt": None}, {}, ["has no prompt", "field_prompt"]),
        ({"prompt": "  "}, {}, ["its prompt is empty"]),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, {}, ["role 'assistant'", "must end with a user turn"]),
        ({"prompt": [{"role": "user"}]}, {}, ["has no `role` or no `content`"]),
        ({"prompt": 3}, {}, ["must be a string or messages, not int"]),
        ({"chosen": ""}, {}, ["`chosen` is an empty response"]),
        ({"rejected": None}, {}, ["`rejected` is empty"]),
        ({}, {"field_chosen": "better"}, ["no column `better`", "name the right one with field_chosen"]),
        ({"chosen": [{"role": "user", "content": "x"}]}, {}, ["must end with a turn of role 'assistant'"]),
        (
            {"chosen": [{"role": "user", "content": "Another?"}, {"role": "assistant", "content": "x"}]},
            {},
            ["turns of `chosen` before its last one differ from the prompt"],
        ),
        ({"rejected": ROW["chosen"] + " "}, {}, ["chosen and rejected responses are the same text"]),
        ({"chosen_scores": {"helpfulness": None}}, {}, ["score of helpfulness for the chosen", "not a finite number"]),
        ({"chosen_scores": {"helpfulness": "N/A"}}, {}, ["score of helpfulness for the chosen", "not a finite number"]),
        ({"chosen_scores": {"helpfulness": float("nan")}}, {}, ["score of helpfulness", "not a finite number"]),
        ({"chosen_scores": {"helpfulness": float("inf")}}, {}, ["score of helpfulness", "not a finite number"]),
        (
            {"chosen_scores": {"other": 1}},
            {},
            ["no score of helpfulness", "its scores are", "field_chosen_scores"],
        ),
        ({}, {"field_chosen_scores": "{}_x"}, ["no column like `{}_x`; its columns are prompt,"]),
        ({}, {"field_chosen_scores": "ratings"}, ["no column `ratings`; its columns are prompt,"]),
        ({"chosen_scores": "4"}, {}, ["`chosen_scores` must be a mapping of names to scores, not str"]),
        ({"chosen_scores": {"helpfulness": 5}}, {}, ["score of helpfulness, 5, is outside 0 to 4", "score_scale"]),
    ],
)
def test_a_bad_row_is_named(tokenizer, row, entry, words):
    bad = {key: value for key, value in {**copy.deepcopy(ROW), **row}.items() if value is not None or key == "rejected"}
    with pytest.raises(DataError) as caught:
        prepare([bad], tokenizer, entry=entry)
    for word in ["datasets[0] (", "rows.parquet), row 0", "on_bad_row: drop", *words]:
        assert word in str(caught.value)


def test_the_number_of_a_bad_row_counts_over_all_processes(tokenizer):
    rows = [ROW] * 30
    rows[23] = {**ROW, "chosen": " "}
    for num_proc in (1, 2):
        with pytest.raises(DataError, match=r"rows.parquet\), row 23: its `chosen` is an empty response"):
            prepare(rows, tokenizer, num_proc=num_proc)


def test_a_missing_margin_score_is_named(tokenizer):
    with pytest.raises(DataError, match=r"row 0: it has no score of safer for the chosen response"):
        prepare(
            [ROW],
            tokenizer,
            method="modpo",
            weights={"better": 1, "safer": 1},
            margins={"safer": {"source": "column"}},
        )


def test_a_tokenizer_without_a_chat_template_is_named(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(DataError, match=r"no chat template; set `chat_template:`"):
        prepare([ROW], plain)


def test_a_template_without_an_end_of_turn_gets_the_eos_token(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (row,) = prepare([ROW], bare, method="modpo")
    # The space at the end of the prompt and the first word are one token, which belongs to the response.
    assert row["chosen"] == " The sun is bigger.<|im_end|>"
    assert row["prompt"] == "[user] Which is bigger? [assistant]"
    whole = bare("[user] Which is bigger? [assistant] The sun is bigger.<|im_end|>")["input_ids"]
    assert row["prompt_input_ids"][0] + row["chosen_input_ids"] == whole


def test_a_tokenizer_that_adds_special_tokens_adds_none_to_what_the_template_writes(tokenizer):
    """As Llama's does: its template writes the token that it would put before every text."""
    adding = copy.deepcopy(tokenizer)
    names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")]
    adding.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A <|im_end|>", special_tokens=names)
    assert adding("x")["input_ids"] == [names[0][1], *tokenizer("x")["input_ids"], names[1][1]]
    rows = [ROW, {**ROW, "prompt": "word " * 300}, {**ROW, "chosen": "very " * 400}]
    settings = {"sequence_len": 200, "excess_length_strategy": "truncate"}
    assert prepare(rows, adding, **settings) == prepare(rows, tokenizer, **settings)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"row 0: the chat template of .* renders the turns before a response differently"
    ):
        prepare([ROW], rewriting)


@pytest.fixture
def strict(tokenizer):
    """A tokenizer whose chat template refuses a system's turn."""
    strict = copy.deepcopy(tokenizer)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict.chat_template = refusal + tokenizer.chat_template
    return strict


def test_a_conversation_that_the_template_refuses_is_named(strict):
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(
        DataError, match="row 0: the chat template refuses a conversation of the roles system, user: no"
    ):
        prepare([{**ROW, "prompt": messages}], strict)


def test_a_conversation_that_the_template_refuses_is_dropped_and_counted(strict, host_log):
    rows = [{**ROW, "prompt": [{"role": "user", "content": "x"}]}] * 3
    rows[1] = {**ROW, "prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}
    with host_log.at_level("INFO", "axolotl.mopo"):
        assert len(prepare(rows, strict, entry={"on_bad_row": "drop"})) == 2
    assert "3 rows read; 2 pairs made" in host_log.text
    assert "1 bad rows or responses dropped: 1 refused by the chat template" in host_log.text


def test_control_tokens_are_found_among_hundreds_that_begin_alike():
    tokens = [f"<|reserved_{n}|>" for n in range(300)] + ["<s>", "</s>", "[X]", "^"]
    counting = ControlTokenCount(SimpleNamespace(added_tokens_decoder={}, all_special_tokens=tokens))
    texts = ["<|reserved_30|>", "<|reserved_3|", "</s> <s>", "[x] s>", "2^3", "[X"]
    pair = [PreferencePair([], RatedResponse(text, {}), RatedResponse("<s", {})) for text in texts]
    assert len(list(counting.watch(enumerate(pair)))) == len(texts)
    assert (counting.pairs, counting.first_row) == (3, 0)
    assert counting.found == {"<|reserved_30|>": 1, "</s>": 1, "<s>": 1, "^": 1}
    plain = ControlTokenCount(SimpleNamespace(added_tokens_decoder={}, all_special_tokens=[]))
    assert len(list(plain.watch(enumerate(pair)))) == len(texts)
    assert plain.pairs == 0


@pytest.mark.parametrize("method", ["modpo", "amopo"])
def test_a_label_and_joined_ratings_are_trained_on_in_the_rows_of_one_split(tokenizer, tmp_path, method):
    attributes = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 1)
    ratings = [{"prompt": "Why?", "response": text, "helpfulness": h, **attributes} for text, h in (("A", 1), ("B", 3))]
    Dataset.from_list(ratings).to_parquet(tmp_path / "ratings.parquet")
    row = {"prompt": "Why?", "response_1": "A", "response_2": "B", "preference_strength": -1}
    rows = [{**row, "split": "train"}, {**row, "split": "val", "preference_strength": 1}]
    entry = {"ratings": str(tmp_path / "ratings.parquet"), "where": {"split": "train"}}
    settings = {}
    if method == "modpo":
        settings = {"weights": {"better": 1, "helpfulness": 1}, "margins": {"helpfulness": {"source": "column"}}}
    (made,) = prepare(rows, tokenizer, method=method, kind="helpsteer2", entry=entry, **settings)
    assert (made["chosen"], made["rejected"]) == ("A<|im_end|>", "B<|im_end|>")
    if method == "modpo":
        assert (made["chosen_margin_rewards"], made["rejected_margin_rewards"]) == ([1], [3])
    else:
        assert "whose helpfulness rates 1." in tokenizer.decode(made["prompt_input_ids"][1])


def test_control_tokens_in_texts_are_counted_and_stay(tokenizer, host_log):
    rows = [
        ROW,
        {**ROW, "chosen": "a<|im_end|>b<|im_end|>"},
        {**ROW, "prompt": "<|im_start|>?", "rejected": "<|im_end|>"},
    ]
    made = prepare([{**row, "chosen": f"{row['chosen']} {n}"} for n, row in enumerate(rows)], tokenizer, method="modpo")
    assert made[1]["chosen_input_ids"].count(tokenizer.eos_token_id) == 3
    expected = (
        "2 pairs contain control tokens of the tokenizer as text (<|im_end|> in 2, <|im_start|> in 1), the first of "
        "them in row 1. They are trained on as control tokens"
    )
    assert expected in host_log.text
    host_log.clear()
    prepare([ROW, {**ROW, "chosen": "im_end <|im|>"}], tokenizer, method="modpo")
    assert "control tokens" not in host_log.text


def test_a_template_that_leaves_the_answer_out_is_refused(tokenizer):
    mute = copy.deepcopy(tokenizer)
    mute.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}x"
    with pytest.raises(DataError, match="leaves out the assistant's response"):
        prepare([ROW], mute)


def test_columns_of_mixed_kinds_in_a_jsonl_file_are_read_as_what_they_are(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_scores": {"h": "4"}, "rejected_scores": {"h": 1}},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": {"role": "assistant", "content": "b"},
            "chosen_scores": {"h": 4},
            "rejected_scores": {"h": "1"},
        },
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = load_dataset("json", data_files=str(path), split="train")
    source = PairReader(table, DataSpec(where="mixed", strategy="pairs", options={}))
    one, two = [pair for _, pair in source.pairs()]
    assert one == two
    assert one.prompt == [{"role": "user", "content": "q"}]
    assert one.chosen.scores == {"h": 4}


def test_a_turn_may_hold_a_date(tmp_path):
    path = tmp_path / "dated.jsonl"
    turn = {"role": "user", "content": "q", "at": "2024-05-01T10:00:00"}
    path.write_text(json.dumps({"messages": [turn], "chosen": "a", "rejected": "b"}))
    table = load_dataset("json", data_files=str(path), split="train")
    source = PairReader(table, DataSpec(where="dated", strategy="pairs", options={}))
    ((_, pair),) = source.pairs()
    json.dumps(pair.to_row())
    assert pair.prompt[0]["at"].startswith("2024-05-01")


def fits(row, tokenizer, sequence_len):
    return _drop_long_sequences(row, RLType.ORPO, tokenizer, sequence_len)


def test_the_hosts_length_filter_counts_the_directive_in(tokenizer):
    (row,) = prepare([ROW], tokenizer, dimensions=["helpfulness", "correctness"])
    longest = max(len(ids) for ids in row["prompt_input_ids"])
    needed = longest + max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"]))
    assert fits(row, tokenizer, needed)
    assert not fits(row, tokenizer, needed - 1)
    (plain,) = prepare([ROW], tokenizer, method="modpo")
    assert fits(plain, tokenizer, needed - 1)


def test_over_long_rows_raise_with_their_number(tokenizer):
    rows = [ROW, {**ROW, "chosen": "very " * 400}]
    with pytest.raises(
        DataError, match=r"row 1: it needs \d+ tokens including its directive, more than sequence_len: 200"
    ):
        prepare(rows, tokenizer, sequence_len=200, excess_length_strategy="raise")


def test_over_long_completions_are_truncated_to_what_the_directive_leaves(tokenizer):
    long = {**ROW, "chosen": "very naïve 日本 " * 100}
    (row,) = prepare([long], tokenizer, sequence_len=200, excess_length_strategy="truncate")
    longest = max(len(ids) for ids in row["prompt_input_ids"])
    assert len(row["chosen_input_ids"]) in range(200 - longest - 4, 200 - longest + 1)
    assert row["rejected"] == "Moon.<|im_end|>"
    assert fits(row, tokenizer, 200)


def test_a_question_that_is_too_long_loses_its_oldest_part_and_keeps_directive_and_header(tokenizer):
    question = " ".join(f"word{index}" for index in range(300))
    directives = ("<|im_start|>user\nAs an expert,", "<|im_start|>user\nPay attention")
    for strategy in ("drop", "truncate"):
        (row,) = prepare([{**ROW, "prompt": question}], tokenizer, sequence_len=200, excess_length_strategy=strategy)
        prompts, chosen, _ = texts(row, tokenizer)
        assert chosen == "The sun is bigger.<|im_end|>"
        kept = {prompt.split("\n\n", 1)[1] for prompt in prompts}
        (rest,) = kept  # the same part of the question under every directive
        assert question.endswith(rest.removesuffix("<|im_end|>\n<|im_start|>assistant\n"))
        for prompt, directive in zip(prompts, directives, strict=True):
            assert prompt.startswith(directive)
            assert prompt.endswith("word299<|im_end|>\n<|im_start|>assistant\n")
        used = max(map(len, row["prompt_input_ids"])) + len(row["chosen_input_ids"])
        assert used in range(195, 201)  # no more is cut than must be
        assert row["cut_prompt_tokens"] > 100
        assert row["cut_completion_tokens"] == 0
        assert fits(row, tokenizer, 200)


def test_the_oldest_turns_go_before_any_part_of_the_last_one(tokenizer):
    old = [{"role": "user", "content": "old " * 90}, {"role": "assistant", "content": "older " * 90}]
    recent = [{"role": "user", "content": "recent"}, {"role": "assistant", "content": "reply"}]
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": ROW["prompt"]}
    (row,) = prepare([{**ROW, "prompt": [system, *old, *recent, question]}], tokenizer, sequence_len=200)
    (short,) = prepare([{**ROW, "prompt": [system, *recent, question]}], tokenizer, sequence_len=200)
    assert row["prompt_input_ids"] == short["prompt_input_ids"]
    assert row["cut_prompt_tokens"] > 180 > short["cut_prompt_tokens"] == 0


def test_completions_that_leave_a_question_no_room_follow_the_strategy(tokenizer):
    long = {**ROW, "prompt": "why " * 100, "chosen": "very " * 190}
    (dropped,) = prepare([long], tokenizer, sequence_len=200, excess_length_strategy="drop")
    assert not fits(dropped, tokenizer, 200)
    (cut,) = prepare([long], tokenizer, sequence_len=200, excess_length_strategy="truncate")
    assert fits(cut, tokenizer, 200)
    assert cut["prompt"].endswith("why why <|im_end|>\n<|im_start|>assistant\n")
    assert min(cut["cut_prompt_tokens"], cut["cut_completion_tokens"]) > 20


def test_a_directive_that_leaves_no_room_at_all_is_left_to_the_hosts_filter(tokenizer):
    (row,) = prepare([ROW], tokenizer, sequence_len=40, excess_length_strategy="truncate")
    assert not fits(row, tokenizer, 40)


def test_the_embedded_pairs_are_prepared_alike_by_one_and_two_processes(tokenizer):
    rows = [json.loads(line) for line in (SMOKE / "pairs.jsonl").read_text().splitlines()]
    one, two = (prepare(rows, tokenizer, num_proc=n) for n in (1, 2))
    assert one == two
    assert len(one) == 320

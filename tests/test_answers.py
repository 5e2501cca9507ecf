"""What of a response is trained on: reasoning, tool calls and several turns, by hand and in both layouts."""

import copy
import json
from datetime import date
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from conftest import CONFIGS, axolotl, build_model, prepare, smoke_config
from datasets import Dataset
from test_data import ROW

from axolotl_mopo.cli import mopo
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.shown_tokens import as_text, responses
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.strategies import tokenize_pair
from axolotl_mopo.data.tokenizing import ControlTokenCount
from axolotl_mopo.errors import DataError, RowError
from axolotl_mopo.logprobs.attention import use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer, by_side
from axolotl_mopo.logprobs.trees import Completion, Pair, pack, pad
from axolotl_mopo.losses import adaptive_weights
from axolotl_mopo.training.collator import read_tokens

# A header, an optional thought, the content, an optional list of calls; only thoughts after the last question remain.
TEMPLATE = """\
{% set ns = namespace(last=0) %}\
{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
{% if tools %}<|im_start|>tools{% for tool in tools %} {{ tool['function']['name'] }}{% endfor %}\
<|im_end|>\n{% endif %}\
{% for m in messages %}<|im_start|>{{ m['role'] }}\n\
{% if m['role'] == 'assistant' and loop.index0 > ns.last and (loop.last or m['reasoning_content']) %}\
<think>{{ m['reasoning_content'] }}</think>\n{% endif %}{{ m['content'] or '' }}\
{% for call in m['tool_calls'] %}<call>{{ call['function']['name'] }}({{ call['function']['arguments'] | tojson }})\
</call>{% endfor %}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% if open_thought %}<think>{% endif %}{% endif %}\
"""
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Look."}
RESULT = {"role": "tool", "content": "12:00"}
ANSWER = {"role": "assistant", "content": "Noon.", "reasoning_content": "Twelve."}
CALLED = '<call>clock({"zone": "UTC"})</call><|im_end|>'


@pytest.fixture(scope="module")
def thinking(tokenizer):
    """A tokenizer whose chat template prints reasoning, tools and tool calls."""
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = TEMPLATE
    return thinking


def rows_of(tokenizer, rows, *, kind="pairs", objective=(), inputs=None, **options):
    """The prepared rows of a MODPO run, without Axolotl."""
    settings = {"strategy": kind, "objective": objective, "options": options, "chat_template_kwargs": inputs or {}}
    spec = DataSpec(where="data.jsonl", **settings)
    check = partial(ChatRenderer(tokenizer, inputs).check, turns=spec.options.turns)
    table = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    reader = PairReader(table, spec, check)
    return [tokenize_pair(tokenizer, pair, spec, 10_000) for _, pair in reader.pairs()]


def parts(tokenizer, row, side="chosen"):
    """The prompt, and the response as (text, whether it is trained on)."""
    shown = responses(tokenizer, row)[side]
    joined = []
    for token in shown:
        if joined and joined[-1][1] == token["trained"]:
            joined[-1] = (joined[-1][0] + token["text"], token["trained"])
        else:
            joined.append((token["text"], token["trained"]))
    return tokenizer.decode(row["prompt_input_ids"][0]), joined


def with_response(turns, **others):
    return {"prompt": "What time is it?", "chosen": turns, "rejected": "No idea.", **others}


ASKED = "<|im_start|>user\nWhat time is it?<|im_end|>\n<|im_start|>assistant\n"


def test_all_of_a_response_or_its_answer_alone(thinking):
    row = with_response([ANSWER])
    (whole,), (answer,) = (rows_of(thinking, [row], completion=each) for each in ("all", "answer"))
    assert parts(thinking, whole) == (ASKED, [("<think>Twelve.</think>\nNoon.<|im_end|>", True)])
    assert parts(thinking, answer) == (ASKED, [("<think>Twelve.</think>\n", False), ("Noon.<|im_end|>", True)])
    # The empty thought that the template writes of a response without reasoning is none of its answer either.
    assert parts(thinking, answer, "rejected")[1] == [("<think></think>\n", False), ("No idea.<|im_end|>", True)]
    assert whole["chosen_input_ids"] == answer["chosen_input_ids"]


@pytest.mark.parametrize(
    ("text", "inputs"),
    [("<think>Twelve.</think>\nNoon.", {}), ("Twelve.</think>Noon.", {"open_thought": True})],
    ids=["opened by the text", "opened by the prompt"],
)
def test_reasoning_in_the_text_is_that_of_the_template(thinking, text, inputs):
    settings = {"completion": "answer", "inputs": inputs}
    apart, together = (rows_of(thinking, [with_response(each)], **settings) for each in ([ANSWER], text))
    assert apart == together


@pytest.mark.parametrize("text", ["Write </think> to end it.", "Sure! <think>a</think>b"])
def test_the_mark_of_a_thought_within_an_answer_stays_where_it_is(thinking, text):
    (made,) = rows_of(thinking, [with_response(text)])
    assert parts(thinking, made)[1] == [(f"<think></think>\n{text}<|im_end|>", True)]


def test_reasoning_in_the_text_of_a_template_that_knows_none_is_no_answer(tokenizer):
    (row,) = rows_of(tokenizer, [with_response("<think>Twelve.</think>\n\nNoon.")], completion="answer")
    assert parts(tokenizer, row) == (ASKED, [("<think>Twelve.</think>\n\n", False), ("Noon.<|im_end|>", True)])


def test_a_prompt_that_opens_a_thought_leaves_the_rest_of_it_to_the_response(thinking):
    row = with_response([ANSWER])
    (made,) = rows_of(thinking, [row], inputs={"open_thought": True})
    assert parts(thinking, made) == (f"{ASKED}<think>", [("Twelve.</think>\nNoon.<|im_end|>", True)])


def test_the_assistants_turns_of_a_response_and_none_between_them(thinking):
    row = with_response([CALLING, RESULT, ANSWER], tools=json.dumps(TOOLS))
    between = "\n<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\n"
    asked = f"<|im_start|>tools clock<|im_end|>\n{ASKED}"
    expected = {
        ("all", "all"): [
            (f"<think>Look.</think>\n{CALLED}", True),
            (between, False),
            ("<think>Twelve.</think>\nNoon.<|im_end|>", True),
        ],
        ("all", "last"): [
            (f"<think>Look.</think>\n{CALLED}{between}", False),
            ("<think>Twelve.</think>\nNoon.<|im_end|>", True),
        ],
        ("answer", "all"): [
            ("<think>Look.</think>\n", False),
            (CALLED, True),
            (f"{between}<think>Twelve.</think>\n", False),
            ("Noon.<|im_end|>", True),
        ],
        ("answer", "last"): [
            (f"<think>Look.</think>\n{CALLED}{between}<think>Twelve.</think>\n", False),
            ("Noon.<|im_end|>", True),
        ],
    }
    for (completion, turns), pieces in expected.items():
        (made,) = rows_of(thinking, [row], completion=completion, turns=turns)
        assert parts(thinking, made) == (asked, pieces)


def test_a_turn_that_is_rendered_differently_where_another_follows_keeps_its_end(thinking):
    """The template writes an empty thought for the last turn only."""
    calling = {key: value for key, value in CALLING.items() if key != "reasoning_content"}
    (made,) = rows_of(thinking, [with_response([calling, RESULT, ANSWER])])
    assert parts(thinking, made)[1][0] == (CALLED, True)


def test_an_earlier_thought_that_the_template_drops_is_refused_unless_it_is_not_trained_on(thinking):
    earlier = {**ANSWER, "content": "Which zone?", "reasoning_content": "Ask."}
    row = with_response([earlier, {"role": "user", "content": "UTC"}, ANSWER])
    with pytest.raises(DataError, match=r"row 0: the chat template of .* leaves out the reasoning of a turn"):
        rows_of(thinking, [row])
    (made,) = rows_of(thinking, [row], turns="last")
    between = "Which zone?<|im_end|>\n<|im_start|>user\nUTC<|im_end|>\n<|im_start|>assistant\n"
    assert parts(thinking, made)[1] == [(between, False), ("<think>Twelve.</think>\nNoon.<|im_end|>", True)]


def test_dialogues_share_their_prompt_up_to_the_first_answer_that_differs(thinking):
    before = [{"role": "user", "content": "What time is it?"}, CALLING, RESULT]
    row = {"chosen": [*before, ANSWER], "rejected": [*before, {"role": "assistant", "content": "One."}], "tools": TOOLS}
    apart = {**row, "prompt": before, "chosen": [ANSWER], "rejected": "One."}
    assert rows_of(thinking, [row]) == rows_of(thinking, [apart])
    (made,) = rows_of(thinking, [row])
    assert parts(thinking, made)[0].endswith("<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\n")


def test_rows_of_tables_are_those_of_json_text(thinking):
    """A table fills the keys that a call or a turn lacks with null."""
    others = {"type": "function", "function": {"name": "map", "arguments": {"place": "Oslo"}}}
    rows = [with_response([{**CALLING, "tool_calls": [call]}], tools=TOOLS) for call in (CALL, others)]
    text = [{**row, "chosen": json.dumps(row["chosen"]), "tools": json.dumps(TOOLS)} for row in rows]
    assert rows_of(thinking, rows) == rows_of(thinking, text)
    assert parts(thinking, rows_of(thinking, rows)[1])[1][0][0].endswith(
        '<call>map({"place": "Oslo"})</call><|im_end|>'
    )


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
def test_a_null_in_json_text_stays_and_one_in_a_table_goes(name):
    value = {"name": "clock", "open_thought": None, "parameters": {"default": None, "type": "string"}}
    value = [value] if name == "tools" else value
    spec = DataSpec(where="data.jsonl", strategy="pairs", options={})
    text, table = (spec.format.read_pair({**ROW, name: each}, spec.options) for each in (json.dumps(value), value))
    assert text.inputs.to_row()[name] == value
    assert "None" not in str(table.inputs.to_row()[name])


def test_arguments_that_are_json_text_are_the_same_call(thinking):
    text = {"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    made = [rows_of(thinking, [with_response([{**CALLING, "tool_calls": [call]}])]) for call in (CALL, text)]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (with_response([ANSWER], chat_template_kwargs={"mood": 1}), "does not read `mood`"),
        (with_response([ANSWER], chat_template_kwargs={"tokenize": True}), "must not have `tokenize`"),
        (with_response([ANSWER], chat_template_kwargs={"eos_token": "x"}), "must not have `eos_token`"),
        (with_response([ANSWER], chat_template_kwargs={"think": "x"}), "does not read `think`"),
        (with_response([ANSWER], tools="[{"), "its `tools` is a text that is not JSON"),
        (with_response([ANSWER], tools={"name": "clock"}), "must be a list of function definitions"),
        (with_response([{**ANSWER, "tool_calls": [{"name": ""}]}]), "a tool call in its `chosen` must have a `name`"),
        (with_response([{**ANSWER, "tool_calls": "clock"}]), "is a text that is not JSON"),
        (with_response([{**ANSWER, "function_call": {"name": "clock"}}]), "the old form of a tool call"),
        (with_response([{**ANSWER, "thinking": "Other."}]), "must be one text"),
        (
            with_response([{"role": "user", "content": "x", "thinking": "y"}, ANSWER]),
            "has reasoning_content; only assist",
        ),
        (with_response([ANSWER, RESULT]), "must end with a turn of role 'assistant', not 'tool'"),
        (with_response([{"role": "assistant", "content": None}]), "no `role` or no `content`"),
        ({**with_response([ANSWER]), "prompt": [RESULT]}, "its prompt ends with a turn of role 'tool'"),
    ],
)
def test_what_cannot_be_read_is_named(thinking, row, words):
    with pytest.raises(DataError, match=r"data\.jsonl, row 0: ") as caught:
        rows_of(thinking, [row])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (with_response([ANSWER]), "leaves out the reasoning of a turn of role assistant"),
        (with_response([CALLING]), "does not print tool calls"),
        (with_response([{"role": "assistant", "content": "Noon."}], tools=TOOLS), "does not print `tools`"),
    ],
)
def test_what_the_template_does_not_print_is_refused_and_may_be_left_out(tokenizer, row, words):
    with pytest.raises(DataError, match=words):
        rows_of(tokenizer, [row])
    assert (
        len(rows_of(tokenizer, [row, with_response([{"role": "assistant", "content": "Noon."}])], on_bad_row="drop"))
        == 1
    )


def test_rated_responses_keep_their_reasoning_and_the_tools_of_their_prompt(thinking, tokenizer):
    prompt = [{"role": "user", "content": "What time is it?"}]
    better, worse = (
        {"prompt": prompt, "response": text, "score": score} for text, score in (("Noon.", 2), ("One.", 1))
    )
    rows = [{**better, "reasoning": "Twelve.", "tools": TOOLS}, {**worse, "reasoning": None, "tools": TOOLS}]
    (made,) = rows_of(thinking, rows, kind="responses", objective=("score",))
    assert made == rows_of(thinking, [{**with_response([ANSWER], tools=TOOLS), "rejected": "One."}])[0]
    with pytest.raises(DataError, match=r"data\.jsonl, row 0: the chat template of .* does not print `tools`"):
        rows_of(tokenizer, rows, kind="responses", objective=("score",))
    with pytest.raises(DataError, match="row 1: its prompt is that of other rows whose `tools` or"):
        rows_of(thinking, [rows[0], {**rows[1], "tools": None}], kind="responses", objective=("score",))


def calling(**changes):
    """A response that calls the clock, with another call."""
    return with_response([{**CALLING, "tool_calls": [{**CALL, **changes}]}], tools=TOOLS)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            calling(function={"name": "clock", "arguments": {"day": date(2024, 7, 26)}}),
            "write the whole column as JSON",
        ),
        ({**calling(), "tools": [{"name": "clock", "day": date(2024, 7, 26)}]}, "write the whole column as JSON text"),
        ({**calling(), "chat_template_kwargs": {"open_thought": date(2024, 7, 26)}}, "write the whole column as JSON"),
        (calling(function={"name": "clock", "arguments": '{"zone": "\\ud800"}'}), "contains a lone surrogate"),
        ({**calling(), "tools": '[{"name": "clock", "zone": "\\ud800"}]'}, "contains a lone surrogate"),
        ({**calling(), "tools": '{"a":' * 100_000}, "is a text that is not JSON"),
        (with_response([{**ANSWER, "tool_calls": "[" * 100_000}]), "is a text that is not JSON"),
    ],
)
def test_what_json_cannot_hold_is_named_or_left_out(thinking, row, words):
    spec = DataSpec(where="data.jsonl", strategy="pairs", options={})
    with pytest.raises(RowError) as refused:
        spec.format.read_pair(row, spec.options)
    assert words in str(refused.value)


def test_a_text_that_looks_like_deep_json_is_a_text(thinking):
    (made,) = rows_of(thinking, [{**ROW, "prompt": "[" * 5_000}])
    assert thinking.decode(made["prompt_input_ids"][0]).count("[") == 5_000


def test_a_call_that_the_template_refuses_is_a_bad_row_wherever_it_stands(thinking):
    strict = copy.deepcopy(thinking)
    strict.chat_template = "{% for m in messages %}{% for call in m['tool_calls'] %}{% if call['id'] == 'bad' %}"
    strict.chat_template += "{{ raise_exception('bad id') }}{% endif %}{% endfor %}{% endfor %}" + TEMPLATE
    good, bad = calling(id="good"), calling(id="bad")
    for rows in ([bad, good, good], [good, good, bad]):
        assert len(rows_of(strict, rows, on_bad_row="drop")) == 2
        with pytest.raises(DataError, match=f"row {rows.index(bad)}: the chat template refuses .* bad id"):
            rows_of(strict, rows)


def test_responses_that_differ_in_the_form_of_their_call_alone_are_identical(thinking):
    text = {"id": "2", "function": {"name": "clock", "arguments": '{"zone":"UTC"}'}}
    row = {**calling(id="1"), "rejected": json.dumps([{**CALLING, "tool_calls": [text]}])}
    with pytest.raises(DataError, match="its chosen and rejected responses are the same"):
        rows_of(thinking, [{**row, "chosen": json.dumps(row["chosen"])}])


def test_control_tokens_in_calls_and_tools_are_counted(thinking):
    inside = calling(function={"name": "clock", "arguments": {"zone": "<|im_end|>"}})
    spec = DataSpec(where="data.jsonl", strategy="pairs", options={})
    count = ControlTokenCount(thinking)
    pairs = [spec.format.read_pair(row, spec.options) for row in (calling(), inside)]
    assert len(list(count.watch(enumerate(pairs)))) == 2
    assert (count.pairs, count.first_row) == (1, 1)


def test_a_tokenizer_may_have_another_template_for_tools(tokenizer):
    both = copy.deepcopy(tokenizer)
    both.chat_template = {"default": tokenizer.chat_template, "tool_use": TEMPLATE}
    (made,) = rows_of(both, [calling()], completion="answer")
    assert parts(both, made)[1] == [("<think>Look.</think>\n", False), (CALLED, True)]


def test_completions_that_are_cut_within_a_character_keep_spans_within_their_tokens(tokenizer):
    row = {**ROW, "chosen": "\U0001f600" * 60}
    for sequence_len in range(140, 152):
        settings = {"sequence_len": sequence_len, "excess_length_strategy": "truncate"}
        (made,) = prepare([row], tokenizer, **settings)
        assert made["chosen_spans"] == [0, len(made["chosen_input_ids"])]
        assert pack([read_tokens(made)])["lengths"][0] == len(made["chosen_input_ids"])


def random_pair(generator, spans):
    def tokens(count):
        return torch.randint(3, 97, (count,), generator=generator).tolist()

    return Pair([tokens(5), tokens(9)], tokens(8), tokens(6), *spans)


PARTLY = [
    random_pair(torch.Generator().manual_seed(seed), spans)
    for seed, spans in enumerate([([2, 4, 6, 8], [5, 6]), ([0, 8], [0, 1, 3, 6]), ([7, 8], [2, 3])])
]


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "with a shared beginning"])
def test_scored_tokens_are_those_of_the_spans_in_both_layouts(shared):
    """Two completions may share a token that only one of them is scored on."""
    pairs = [pair._replace(rejected=[*pair.chosen[:3], *pair.rejected[3:]]) for pair in PARTLY] if shared else PARTLY
    model = build_model(CONFIGS["qwen3"], dtype=torch.float64)
    padded = LogProbComputer()(model, pad(pairs, 0))
    expected = []
    for one in (one for pair in pairs for one in pair.completions):
        ids = torch.tensor([[*one.prompt, *one.tokens]])
        logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        places = [
            place for start, end in zip(one.spans[::2], one.spans[1::2], strict=True) for place in range(start, end)
        ]
        own = logps[[len(one.prompt) - 1 + place for place in places]]
        std = own.exp().std() if len(own) > 1 else torch.tensor(0.0)
        expected.append((own.sum(), own.exp().mean(), std, torch.tensor(len(own))))
    use_tree_attention(model)
    packed = LogProbComputer()(model, pack(pairs))
    for column, wanted in enumerate(zip(*expected, strict=True)):
        wanted = torch.stack(wanted).double()
        assert torch.allclose(padded[column].double(), wanted, atol=1e-6)
        assert torch.allclose(packed[column].double(), wanted, atol=1e-6)


def test_a_part_that_is_not_scored_changes_what_follows_it():
    model = build_model(CONFIGS["llama"], dtype=torch.float64)
    one, other = (Completion([3, 4, 5], [thought, 7, 8], [1, 3]) for thought in (10, 20))
    scores = LogProbComputer()(model, pad([one, other], 0))
    assert scores.lengths.tolist() == [2, 2]
    assert abs(scores.logps[0] - scores.logps[1]) > 1e-3


def test_amopos_weights_are_those_of_the_answers(thinking):
    rows = [with_response([ANSWER]), with_response([{**ANSWER, "reasoning_content": "It must be twelve o'clock."}])]
    pairs = [read_tokens(row) for row in rows_of(thinking, rows, completion="answer")]
    model = build_model(CONFIGS["llama"].__class__(**{**CONFIGS["llama"].to_dict(), "vocab_size": len(thinking)}))
    pairs = [pair._replace(prompts=[pair.prompts[0], [*pair.prompts[0][:4], *pair.prompts[0][5:]]]) for pair in pairs]
    chosen, rejected = by_side(LogProbComputer()(model, pad(pairs, 0)), prompts=2)
    weights = adaptive_weights(chosen.prob_mean, chosen.prob_std, rejected.prob_mean, rejected.prob_std, scheme="mean")
    by_hand = []
    for pair in pairs:
        for prompt in pair.prompts:
            mean = 0.0
            for tokens, spans in ((pair.chosen, pair.chosen_spans), (pair.rejected, pair.rejected_spans)):
                ids = torch.tensor([[*prompt, *tokens]])
                probs = model(ids).logits.softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
                mean += probs[len(prompt) - 1 + spans[0] : len(prompt) - 1 + spans[1]].mean()
            by_hand.append(mean)
    assert torch.allclose(weights, torch.stack(by_hand).view(2, 2).softmax(-1), atol=1e-6)
    assert chosen.lengths.tolist() == [[len(thinking("Noon.<|im_end|>")["input_ids"])] * 2] * 2


def test_a_length_reward_counts_the_answer(thinking):
    margins = {"short": {"source": "length", "unit": "tokens"}}
    row = {**with_response([ANSWER]), "chosen": [ANSWER]}
    block = {"weights": {"better": 1, "short": 0.1}, "margins": margins}
    (made,) = prepare([row], thinking, method="modpo", entry={"completion": "answer"}, **block)
    assert made["chosen_margin_rewards"] == [-len(thinking("Noon.<|im_end|>")["input_ids"])]


def test_a_directive_stands_in_the_system_message(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    rows = [{**ROW, "prompt": [*before, {"role": "user", "content": "Which?"}]} for before in ([], [system])]
    alone, after = prepare(rows, tokenizer, directive_position="system")
    directive = "As an expert, give the answer that does best on all of these together: helpfulness."
    question = "<|im_end|>\n<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(alone["prompt_input_ids"][0]) == f"<|im_start|>system\n{directive}{question}"
    assert tokenizer.decode(after["prompt_input_ids"][0]) == f"<|im_start|>system\nBe brief.\n\n{directive}{question}"


@pytest.mark.parametrize("position", ["before", "after"])
def test_a_directive_stays_with_the_question_where_a_tools_result_follows(thinking, position):
    row = {**ROW, "prompt": [{"role": "user", "content": "Which?"}, CALLING, RESULT]}
    (made,) = prepare([row], thinking, directive_position=position)
    text = thinking.decode(made["prompt_input_ids"][0])
    question = text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    assert question.endswith("Which?") is (position == "before")
    assert "As an expert" in question
    assert text.endswith("<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\n")


def test_a_long_conversation_keeps_the_tools_result_and_the_answer(thinking):
    before = [{"role": "user", "content": "word " * 300}, CALLING, RESULT]
    row = {**ROW, "prompt": before, "chosen": [ANSWER], "rejected": "One."}
    settings = {"sequence_len": 260, "excess_length_strategy": "truncate", "entry": {"completion": "answer"}}
    (made,) = prepare([row], thinking, **settings)
    text = thinking.decode(made["prompt_input_ids"][0])
    assert text.endswith("<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\n")
    assert made["cut_prompt_tokens"] > 0
    assert parts(thinking, made)[1] == [("<think>Twelve.</think>\n", False), ("Noon.<|im_end|>", True)]


def test_a_response_whose_answer_would_be_cut_off_is_left_to_axolotl_to_drop(thinking):
    long = {**ANSWER, "reasoning_content": "hm " * 400}
    settings = {"sequence_len": 200, "excess_length_strategy": "truncate", "entry": {"completion": "answer"}}
    (made,) = prepare([{**ROW, "chosen": [long]}], thinking, **settings)
    assert len(made["chosen_input_ids"]) > 400
    assert parts(thinking, made)[1][-1] == ("Noon.<|im_end|>", True)


def test_prepared_rows_differ_where_the_template_reads_other_variables(thinking):
    keys = {
        DataSpec(where="x", strategy="pairs", options=options, chat_template_kwargs=kwargs).key
        for options, kwargs in (
            ({}, {}),
            ({}, {"open_thought": True}),
            ({"completion": "answer"}, {}),
            ({"turns": "last"}, {}),
        )
    }
    assert len(keys) == 4


def test_pairs_are_written_and_read_again(thinking, tmp_path):
    row = with_response([CALLING, RESULT, ANSWER], tools=TOOLS, chat_template_kwargs={"open_thought": False})
    scores = {"chosen_scores": {"a": 1.0}, "rejected_scores": {"a": 0.0}}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, **scores}) + "\n")
    made = []
    for name in ("pairs.jsonl", "pairs.parquet"):
        done = CliRunner().invoke(
            mopo, ["pairs", "--type", "pairs", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / name)]
        )
        assert done.exit_code == 0, done.output
        table = (
            Dataset.from_json(str(tmp_path / name))
            if name.endswith("jsonl")
            else Dataset.from_parquet(str(tmp_path / name))
        )
        made.append(rows_of(thinking, table))
    assert made[0] == made[1] == rows_of(thinking, [row])


def test_preprocess_shows_what_is_trained_on(tmp_path, thinking):
    shown = axolotl("preprocess", config_of(tmp_path, thinking), "--debug", "--debug-num-examples", "2", cwd=tmp_path)
    assert shown.count("=== chosen: ") == 2
    assert "Row 1 of the prepared rows:\n=== prompt 0\n<|im_start|>user\n" in shown
    assert "<think>Twelve.</think>\n>>Noon.<|im_end|><<" in shown
    assert "=== chosen" not in axolotl("preprocess", config_of(tmp_path, thinking), cwd=tmp_path)


def test_directives_shows_what_is_trained_on(tmp_path, thinking):
    config = config_of(tmp_path, thinking)
    CliRunner().invoke(mopo, ["directives", str(config), "-o", str(tmp_path / "shown")])
    assert "<think>Twelve.</think>\n>>Noon.<|im_end|><<" in (tmp_path / "shown").read_text()
    CliRunner().invoke(mopo, ["directives", str(config), "--json", "-o", str(tmp_path / "shown")])
    tokens = json.loads((tmp_path / "shown").read_text())["responses"]["chosen"]
    assert "".join(token["text"] for token in tokens if token["trained"]) == "Noon.<|im_end|>"
    assert [token["id"] for token in tokens if token["trained"]][-1] == thinking.eos_token_id


def config_of(tmp_path, tokenizer):
    (tmp_path / "template.jinja").write_text(tokenizer.chat_template)
    rows = [{**ROW, "chosen": [{**ANSWER, "reasoning_content": "Twelve."}], "prompt": f"{n}?"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {
        "path": str(tmp_path / "rows.jsonl"),
        "ds_type": "json",
        "type": "axolotl_mopo.pairs",
        "completion": "answer",
    }
    overrides = {"amopo": {"dimensions": ["helpfulness"], "score_range": [0, 4]}, "test_datasets": None}
    template = {"chat_template": "jinja", "chat_template_jinja": tokenizer.chat_template}
    cfg = smoke_config("amopo", tmp_path, **overrides, **template, datasets=[entry])
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(cfg))
    return path


def test_what_is_trained_on_is_green():
    shown = as_text({"chosen": [{"id": 1, "text": "a", "trained": False}, {"id": 2, "text": "b", "trained": True}]})
    assert shown == "=== chosen: 1 of 2 tokens are trained on\n\x1b[2ma\x1b[0m\x1b[32m>>b<<\x1b[0m"


def test_control_characters_of_a_text_are_escaped():
    shown = as_text({"chosen": [{"id": 1, "text": "a\x1b[2Jb\n", "trained": True}]})
    assert "a\\x1b[2Jb\n<<" in shown

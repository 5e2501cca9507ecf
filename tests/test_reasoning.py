"""Reasoning of generated responses: parted from the answer, scored with or without, and shown folded."""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from conftest import SMOKE, build_model, save_reward_model
from datasets import Dataset, Features, Image, Value
from test_front import browser, comparison, opened  # noqa: F401 (a fixture)
from test_generation import MODPO, generation, logp_by_hand, save_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from axolotl_mopo import MOPOPlugin
from axolotl_mopo.config import AMoPOConfig
from axolotl_mopo.data.conversations import user
from axolotl_mopo.data.export import export_pairs
from axolotl_mopo.data.options import ResponsesOptions
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.reasoning import ReasoningMarks, ReasoningParser, find_marks, joined
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.rows import NO_INPUTS, TemplateInputs
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.tables import load_table
from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import ConfigError, DataError
from axolotl_mopo.evaluation import commands
from axolotl_mopo.evaluation.comparison import Comparison
from axolotl_mopo.evaluation.models import Models, stop_tokens
from axolotl_mopo.evaluation.page import render
from axolotl_mopo.evaluation.policies import Policy, find_policies, reference_policy
from axolotl_mopo.evaluation.prompts import Prompts, read_prompts
from axolotl_mopo.evaluation.report import notes
from axolotl_mopo.evaluation.schema import Sampling
from axolotl_mopo.evaluation.scoring import Scoring, _asked, parse_scorer
from axolotl_mopo.evaluation.statistics import find_front
from axolotl_mopo.training.callbacks import write_manifest

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)
THINKS = (
    f"{TOOLS}{TURNS}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENS = f"{TURNS}{{% if add_generation_prompt %}}<|im_start|>assistant\n<think>\n{{% endif %}}"
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|lane|>inner<|text|>{{ m.thinking }}<|over|><|im_start|>assistant{% endif %}"
    "<|lane|>outer<|text|>{{ m.content }}<|im_end|>"
    "{% else %}<|text|>{{ m.content }}<|over|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
"""A template that writes reasoning and answer as two messages, each with its channel."""
OF_CHANNELS = ReasoningMarks(
    "<|lane|>inner<|text|>", "<|over|><|im_start|>assistant<|lane|>outer<|text|>", "<|lane|>outer<|text|>"
)
QUESTIONS = Prompts("questions", [user("What is 2 plus 3?"), user("Why?")], 0)


def save_model(folder, template):
    """A tiny model on disk with this chat template."""
    tokenizer = AutoTokenizer.from_pretrained(SMOKE / "model")
    tokenizer.chat_template = template
    if template == CHANNELS:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|lane|>", "<|text|>", "<|over|>"]})
    config = AutoConfig.from_pretrained(SMOKE / "model")
    config.vocab_size = len(tokenizer)
    model = build_model(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models by their chat template."""
    folder = tmp_path_factory.mktemp("models")
    return {
        template: save_model(folder / name, template)
        for name, template in (("plain", PLAIN + HEADER), ("thinks", THINKS), ("opens", OPENS), ("channels", CHANNELS))
    }


class Says:
    """An engine whose policies say the same texts to every prompt; a text that ends with `...` is cut off there."""

    def __init__(self, *texts):
        self.texts, self.asked = texts, []

    def check(self, policy, tokenizer):
        return stop_tokens(AutoModelForCausalLM.from_pretrained(policy.whole).generation_config, tokenizer)

    @contextmanager
    def running(self, policy, tokenizer):
        def ids(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        def said(text):
            return (ids(text[:-3]), False) if text.endswith("...") else (ids(text + "<|im_end|>"), True)

        def draw(prompts, seeds):
            self.asked += [tokenizer.decode(prompt) for prompt in prompts]
            return [[said(text) for text in self.texts] for _ in prompts]

        yield draw

    def close(self):
        pass


def generated(folder, model, *texts, prompts=QUESTIONS, **settings):
    """The rows of a model that says these texts."""
    policies = settings.pop("policies", None) or [Policy("p", str(model), tokenizer=str(model))]
    sampling = Sampling(samples=len(texts), max_new_tokens=64)
    engine = settings.pop("engine", None) or Says(*texts)
    made = generation(folder, policies, None, prompts=prompts, sampling=sampling, engine=engine, **settings)
    return made.responses(policies[0].name)[: len(texts)]


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (PLAIN + HEADER, ReasoningMarks()),
        (THINKS, ReasoningMarks()),
        (OPENS, ReasoningMarks()),
        (CHANNELS, OF_CHANNELS),
        # Every turn has an empty reasoning, so that the opening mark is a part of the header.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>"
            "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
            ReasoningMarks("", "</think>", "</think>"),
        ),
        # The prompt opens the reasoning, and the last turn has an empty one.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
            "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
            ReasoningMarks("<think>", "</think>", "<think>\n\n</think>"),
        ),
    ],
)
def test_the_marks_are_those_that_the_template_writes(template, marks):
    tokenizer = AutoTokenizer.from_pretrained(SMOKE / "model")
    tokenizer.chat_template = template
    assert find_marks(ChatRenderer(tokenizer)) == marks


EMPTY = ReasoningMarks("", "</think>", "</think>")


@pytest.mark.parametrize(
    ("marks", "prompt", "text", "parts"),
    [
        (ReasoningMarks(), "x\n", "Five.", (None, "Five.")),
        (ReasoningMarks(), "x\n", " Five.\n", (None, " Five.\n")),
        (ReasoningMarks(), "x\n", "<think>\n2 + 3\n</think>\n\nFive.", ("2 + 3", "Five.")),
        (ReasoningMarks(), "x\n<think>\n", "2 + 3\n</think>\n\nFive.", ("2 + 3", "Five.")),
        (ReasoningMarks(), "x\n<think>\n", "2 + 3", ("2 + 3", "")),
        (ReasoningMarks(), "x\n<think>\n", "2 + 3\n</thi", ("2 + 3", "")),
        (ReasoningMarks(), "x\n", "<think>\n2 + 3", ("2 + 3", "")),
        (ReasoningMarks(), "x\n", "<thi", ("", "")),
        (ReasoningMarks(), "x\n<think>\n\n</think>\n\n", "Five.", (None, "Five.")),
        (ReasoningMarks(), "x\n<think>\n\n</think>\n\n", "The end is </think>.", (None, "The end is </think>.")),
        (EMPTY, "x\n<think>", "2 + 3</think>Five.", ("2 + 3", "Five.")),
        (EMPTY, "x\n<think>", "2 + 3", ("2 + 3", "")),
        (EMPTY, "x\n<think></think>", "Five.", (None, "Five.")),
        (ReasoningMarks("", "=="), "x\n", "2 + 3 == Five.", ("2 + 3 ", " Five.")),
        (ReasoningMarks("", "=="), "x\n", "Five.", (None, "Five.")),
        (OF_CHANNELS, "x", "<|lane|>outer<|text|>Five.", ("", "Five.")),
        (OF_CHANNELS, "x", "<|lane|>inner<|text|>2 + 3", ("2 + 3", "")),
        (OF_CHANNELS, "x", "<|lane|>inner<|text|>2 + 3<|over|><|im_start|>assistant", ("2 + 3", "")),
        (OF_CHANNELS, "x", "<|lane|>in", ("", "")),
        (OF_CHANNELS, "x", "Five.", (None, "Five.")),
    ],
)
def test_a_text_is_parted_at_the_marks(marks, prompt, text, parts):
    assert tuple(marks.part(prompt, text)) == parts


def test_reasoning_is_stored_apart_from_the_answer(models, tmp_path):
    said = ["<think>\nTwo and three.\n</think>\n\nIt is five.", "It is five.", "<think>\nTwo and..."]
    first, second, third = generated(tmp_path, models[THINKS], *said)
    assert (first["reasoning"], first["response"], first["finished"]) == ("Two and three.", "It is five.", True)
    assert (second["response"], second["finished"]) == ("It is five.", True)
    assert not {"reasoning", "reasoning_tokens"} & second.keys()
    assert (third["reasoning"], third["response"], third["finished"]) == ("Two and", "", False)
    tokenizer = AutoTokenizer.from_pretrained(models[THINKS])
    tokens = [tokenizer.decode(row["token_ids"]) for row in (first, second, third)]
    assert tokens == [f"{said[0]}<|im_end|>", f"{said[1]}<|im_end|>", said[2][:-3]]
    assert tokenizer.decode(first["token_ids"][first["reasoning_tokens"] :]) == "It is five.<|im_end|>"
    assert third["reasoning_tokens"] == len(third["token_ids"])
    model = AutoModelForCausalLM.from_pretrained(models[THINKS])
    assert first["logp"] == pytest.approx(logp_by_hand(model, tokenizer, first), abs=1e-3)  # of all tokens


def test_marks_may_be_special_tokens(models, tmp_path):
    said = [
        f"<|lane|>inner<|text|>Two <|lane|>and three.{OF_CHANNELS.closing}It is <|lane|>five.",
        "<|lane|>outer<|text|>It is five.",
        "<|lane|>inner<|text|>Two and<|over|><|im_start|>assistant...",
        "<|lane|>...",
    ]
    rows = generated(tmp_path, models[CHANNELS], *said)
    assert [(row["reasoning"], row["response"]) for row in rows] == [
        ("Two and three.", "It is five."),
        ("", "It is five."),
        ("Two and", ""),
        ("", ""),
    ]
    tokenizer = AutoTokenizer.from_pretrained(models[CHANNELS])
    for row in rows[:2]:
        answer = tokenizer.decode(row["token_ids"][row["reasoning_tokens"] :], skip_special_tokens=True)
        assert answer == "It is five."


def test_a_model_whose_template_has_no_reasoning_is_parted_at_the_usual_mark(models, tmp_path):
    (row,) = generated(tmp_path, models[PLAIN + HEADER], "<think>\nTwo.\n</think>\n\nIt is five.")
    assert (row["reasoning"], row["response"]) == ("Two.", "It is five.")


def test_what_is_cut_off_inside_the_reasoning_is_counted(models, tmp_path):
    """With a real model, whose prompt opens the reasoning."""
    logged = []
    policies = [Policy("p", str(models[OPENS]), tokenizer=str(models[OPENS]))]
    sampling = Sampling(samples=2, max_new_tokens=6)
    made = generation(tmp_path, policies, None, prompts=QUESTIONS, sampling=sampling, log=logged.append)
    rows = made.responses("p")
    assert all(row["response"] == "" and row["reasoning"] for row in rows)
    cut = sum(not row["finished"] for row in rows)
    assert cut > 2
    assert logged[0] == (
        f"p: {cut} of 4 responses were cut off at --max-new-tokens 6, {cut} of them inside the reasoning, so they have "
        "no answer. For longer ones raise it, and choose another --out."
    )
    assert len(logged) == 1 + (cut < 4)


def test_responses_without_an_answer_are_counted_by_their_end(models, tmp_path):
    logged = []
    generated(tmp_path, models[OPENS], "a</think>b", "a</think>b...", "a...", "a", log=logged.append)
    assert logged == [
        "p: 4 of 8 responses were cut off at --max-new-tokens 64, 2 of them inside the reasoning, so they have no "
        "answer. For longer ones raise it, and choose another --out.",
        "p: 2 of 8 responses ended with a stop token inside the reasoning, so they have no answer.",
    ]
    generated(tmp_path / "whole", models[OPENS], "a</think>b", log=(said := []).append)
    assert said == []
    generated(tmp_path / "cut", models[THINKS], "a...", log=said.append)
    assert said == [
        "p: 2 of 2 responses were cut off at --max-new-tokens 64. For longer ones raise it, and choose another --out."
    ]


def test_responses_that_an_older_version_did_not_part_are_not_mixed_with_new_ones(models, tmp_path):
    texts = ["<think>\nTwo.\n</think>\n\nIt is five."]
    generated(tmp_path, models[THINKS], *texts)
    path = tmp_path / "responses" / "p.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["reasoning"], row["reasoning_tokens"]
        row["response"] = texts[0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="was generated by an older version, which did not part its reasoning"):
        generated(tmp_path, models[THINKS], *texts)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
CALLED = [*user("What is 2 plus 3?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
CALLED += [{"role": "tool", "content": "5"}]


def prompts_of(folder, *rows, **options):
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(str(folder / "prompts.jsonl"), **options)


def test_tools_and_template_variables_are_read_with_a_prompt(tmp_path):
    rows = [
        {"prompt": "Why?"},
        {"prompt": "Why?", "tools": [TOOL]},
        {"prompt": "Why?", "tools": json.dumps([TOOL])},
        {"prompt": CALLED, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    prompts = prompts_of(tmp_path, *rows)
    assert prompts.conversations == [user("Why?"), user("Why?"), CALLED]
    assert [prompts.inputs_of(number) for number in range(3)] == [
        NO_INPUTS,
        TemplateInputs([TOOL]),
        TemplateInputs([TOOL], {"enable_thinking": False}),
    ]
    assert prompts.repeated == 1
    without = Prompts("x", prompts.conversations, 0)
    assert prompts.digest != without.digest == fingerprint(without.conversations)
    assert prompts_of(tmp_path, {"prompt": json.dumps(CALLED)}).conversations == [CALLED]


def test_prompts_without_more_keep_their_digest(tmp_path):
    prompts = prompts_of(tmp_path, {"prompt": "Why?", "tools": []}, {"prompt": "How?", "tools": None})
    assert prompts.inputs == ()
    assert prompts.digest == fingerprint([user("Why?"), user("How?")])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "What is it?", "images": ["a.png"]}, "row 1: its `images` is not empty, but images"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "row 1: a turn of its `prompt` has a part of"),
        ({"prompt": "Why?", "tools": "x"}, "row 1: its `tools` is a text that is not JSON"),
        ({"prompt": CALLED[:2]}, "row 1: its prompt ends with a turn of role 'assistant'"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        prompts_of(
            tmp_path, {"prompt": [*user("How?")]} if isinstance(row["prompt"], list) else {"prompt": "How?"}, row
        )


def test_a_picture_is_not_decoded_to_be_refused(tmp_path):
    features = Features(prompt=Value("string"), picture=Image())
    pictures = [None, {"bytes": b"not a picture", "path": None}]
    Dataset.from_dict({"prompt": ["Why?", "How?"], "picture": pictures}, features).save_to_disk(tmp_path / "saved")
    assert read_prompts(str(tmp_path / "saved"), limit=1).conversations == [user("Why?")]
    with pytest.raises(DataError, match="row 1: its `picture` is not empty, but images"):
        read_prompts(str(tmp_path / "saved"))


def test_tools_reach_the_chat_template_and_the_rows(models, tmp_path):
    rows = [{"prompt": CALLED, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}, {"prompt": CALLED}]
    prompts = prompts_of(tmp_path, *rows)
    engine = Says("It is five.", "Five!")
    generated(tmp_path / "out", models[THINKS], "It is five.", "Five!", prompts=prompts, engine=engine)
    tokenizer = AutoTokenizer.from_pretrained(models[THINKS])
    variables = ({"tools": [TOOL], "enable_thinking": False}, {})
    assert engine.asked == [
        tokenizer.apply_chat_template(CALLED, tokenize=False, add_generation_prompt=True, **each) for each in variables
    ]
    assert "add" in engine.asked[0]
    assert engine.asked[0].endswith("</think>\n\n")
    made = Comparison(tmp_path / "out")
    made_rows = made.complete("p")
    assert [(row.get("tools"), row.get("chat_template_kwargs")) for row in made_rows[::2]] == [
        ([TOOL], {"enable_thinking": False}),
        (None, None),
    ]
    assert all("tools" not in row and "chat_template_kwargs" not in row for row in made_rows[2:])
    generated(tmp_path / "out", models[THINKS], "It is five.", "Five!", prompts=prompts)  # nothing is drawn again
    with pytest.raises(ConfigError, match="made with prompts"):
        generated(tmp_path / "out", models[THINKS], "a", "b", prompts=Prompts("x", [CALLED, user("Why?")], 0))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (TemplateInputs([TOOL]), "questions, prompt 0, for p: .* does not print `tools`"),
        (
            TemplateInputs((), {"enable_thinking": True}),
            "questions, prompt 0, for p: .* does not read `enable_thinking`",
        ),
    ],
)
def test_a_template_that_does_not_read_what_a_prompt_has_is_named(models, tmp_path, inputs, words):
    prompts = Prompts("questions", [user("Why?")], 0, [inputs])
    with pytest.raises(DataError, match=words):
        generated(tmp_path / "out", models[PLAIN + HEADER], "x", prompts=prompts)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """A model whose chat template leaves out system messages."""
    template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    return save_model(tmp_path_factory.mktemp("silent") / "model", template + HEADER)


def test_a_template_that_leaves_out_a_turn_is_named(silent, tmp_path):
    prompts = Prompts("questions", [[{"role": "system", "content": "Be brief."}, *user("Why?")]], 0)
    with pytest.raises(DataError, match=r"for p: .* leaves out the content of a turn of role system"):
        generated(tmp_path / "out", silent, "x", prompts=prompts)


def test_a_template_may_leave_out_the_reasoning_of_earlier_turns(models, tmp_path):
    thought = {"role": "assistant", "content": "Light.", "reasoning_content": "Short waves scatter."}
    engine = Says("x")
    prompts = Prompts("questions", [[*user("Why is it blue?"), thought, *user("Why?")]], 0)
    generated(tmp_path / "out", models[THINKS], "x", prompts=prompts, engine=engine)
    assert "Light." in engine.asked[0]
    assert "Short" not in engine.asked[0]


def test_a_template_that_leaves_out_the_directive_is_named(silent, tmp_path):
    run = save_run(silent, tmp_path / "run", 1, AMoPOConfig(dimensions=["wit"], directive_position="system"))
    with pytest.raises(DataError, match=r"for run: .* leaves out the content of a turn of role system"):
        generated(tmp_path / "out", silent, "x", policies=find_policies([str(run)]))


def test_generated_rows_are_trained_on_with_reasoning_and_tools(models, tmp_path):
    prompts = prompts_of(tmp_path, {"prompt": CALLED, "tools": [TOOL]}, {"prompt": "Why?"})
    made = Comparison(tmp_path / "out")
    generated(made.folder, models[THINKS], "<think>\nTwo.\n</think>\n\nIt is five.", "Five!", prompts=prompts)
    with Comparison.existing(made.folder) as opened:
        Scoring(opened, Models(), 3, lambda text: None).run(dict([parse_scorer("brief=length")]), {}, False)
    path = str(made.folder / "responses" / "p.jsonl")
    spec = DataSpec(
        where=path, strategy="responses", options=ResponsesOptions(objective=["brief"]), objective=("brief",), seed=1
    )
    reader = PairReader(load_table(path), spec)
    (_, pair), _ = reader.pairs()
    assert (pair.inputs.tools, pair.prompt) == ([TOOL], CALLED)
    assert pair.rejected.messages[0]["reasoning_content"] == "Two."
    assert pair.chosen.text == "Five!"
    assert pair.chosen.scores.keys() == {"brief"}
    export_pairs(PairReader(load_table(path), spec), tmp_path / "pairs.jsonl", None)
    assert len(load_table(str(tmp_path / "pairs.jsonl"))) == 2


def test_a_policy_is_asked_with_the_variables_that_it_was_trained_with(models, tmp_path):
    base = models[THINKS]
    run = save_run(base, tmp_path / "run", 1)
    write_manifest(MODPO, str(base), run, {"enable_thinking": False})
    policies = find_policies([str(run)])
    reference = reference_policy(policies, None, print)
    assert policies[0].chat_template_kwargs == reference.chat_template_kwargs == {"enable_thinking": False}
    sampling = Sampling(max_new_tokens=8)

    def made(name, **settings):
        engine = Says("Five.")
        generation(
            tmp_path / name, policies, reference, prompts=QUESTIONS, sampling=sampling, engine=engine, **settings
        )
        return engine.asked

    assert all(prompt.endswith("<think>\n\n</think>\n\n") for prompt in made("own"))
    assert len(made("other", chat_template_kwargs={"enable_thinking": True})) == 4
    other = made("none", chat_template_kwargs={})
    assert all(prompt.endswith("assistant\n") for prompt in other)
    with pytest.raises(ConfigError, match=r"made with chat_template_kwargs None, not {}; choose another --out"):
        made("own", chat_template_kwargs={})
    with pytest.raises(ConfigError, match=r"made with chat_template_kwargs {}, not None"):
        made("none")
    with pytest.raises(DataError, match=r"run: the chat template of .* does not read `depth`"):
        made("unread", chat_template_kwargs={"depth": 2})


def test_a_folder_without_variables_of_an_older_version_is_gone_on_with(models, tmp_path):
    generated(tmp_path, models[THINKS], "Five.")
    path = tmp_path / "comparison.json"
    settings = json.loads(path.read_text())
    del settings["chat_template_kwargs"], settings["policies"]["p"]["chat_template_kwargs"]
    path.write_text(json.dumps(settings))
    logged = []
    generated(tmp_path, models[THINKS], "Five.", log=logged.append)
    assert logged == ["p: all 2 responses exist already."]


@pytest.mark.parametrize("kwargs", [{"enable_thinking": False}, None])
def test_a_run_records_its_variables(tmp_path, kwargs):
    class Args:
        output_dir = tmp_path

    class State:
        global_step, is_world_process_zero = 3, True

    cfg = DictDefault(
        {"rl": "amopo", "amopo": {"dimensions": ["wit"]}, "base_model": "base", "output_dir": str(tmp_path)}
    )
    cfg.chat_template_kwargs = kwargs
    (tmp_path / "checkpoint-3").mkdir()
    recorder, _ = MOPOPlugin().add_callbacks_pre_trainer(cfg, None)
    recorder.on_save(Args, State, None)
    MOPOPlugin().post_train(cfg, None)
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        content = json.loads((folder / "mopo.json").read_text())
        assert content["base_model"] == "base"
        assert content.get("chat_template_kwargs") == kwargs
        assert ("chat_template_kwargs" in content) is bool(kwargs)


@pytest.mark.parametrize(("text", "words"), [("{x", "{x is not JSON"), ("3", "3 is not a JSON object; write")])
def test_variables_that_are_no_mapping_are_refused(tmp_path, text, words):
    arguments = ["x", "--prompts", "x", "--out", str(tmp_path / "out"), "--chat-template-kwargs", text]
    result = CliRunner().invoke(commands.generate, arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_a_reasoning_longer_than_the_response_is_refused(folder):
    made = Comparison(folder)
    rows = made.responses("p")
    size = len(rows[0]["token_ids"])
    made.replace("p", [{**rows[0], "reasoning_tokens": size}, *rows[1:]])
    assert made.responses("p")[0]["reasoning_tokens"] == size
    made.replace("p", [{**rows[0], "reasoning_tokens": size + 1}, *rows[1:]])
    with pytest.raises(ConfigError, match=r"line 1, `reasoning_tokens`: .* at most the number of `token_ids`"):
        made.responses("p")


@pytest.mark.parametrize("flag", ["with_reasoning", "empty_answers"])
def test_the_options_of_the_command_reach_the_scoring(unanswered, flag):
    arguments = [str(unanswered), "--scorer", LONG]
    assert CliRunner().invoke(commands.score, arguments).exit_code == 1
    result = CliRunner().invoke(commands.score, [*arguments, f"--{flag.replace('_', '-')}"])
    assert result.exit_code == 0, result.output
    assert Comparison(unanswered).objectives["long"].with_reasoning is (flag == "with_reasoning")


JUDGES = """
def length(prompts, responses):
    return [float(len(response)) for response in responses]
"""


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """Responses with reasoning, without, and with nothing but reasoning, and a module of judges."""
    (tmp_path / "their_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("their_judges", None)
    generated(tmp_path / "out", models[THINKS], "<think>\nTwo.\n</think>\n\nIt is five.", "Five!")
    return tmp_path / "out"


LONG = "long=callable:their_judges:length"
BOTH = "<think>\nTwo.\n</think>\n\nIt is five."


def score(folder, *scorers, replace=False, **settings):
    with Comparison.existing(folder) as comparison:
        scoring = Scoring(comparison, Models(), 3, lambda text: None, **settings)
        scoring.run(dict(parse_scorer(text) for text in scorers), {}, replace)
    return Comparison(folder).responses("p")


def test_scorers_read_the_answer(folder):
    scorers = (LONG, "tokens_less=length", "words=length:words", "characters=length:characters")
    with_reasoning, plain = score(folder, *scorers)[:2]
    assert (with_reasoning["long"], plain["long"]) == (len("It is five."), len("Five!"))
    assert with_reasoning["words"] == -3
    assert with_reasoning["characters"] == -len("It is five.")
    tokenizer = AutoTokenizer.from_pretrained(Comparison(folder).policies[0].tokenizer)
    assert with_reasoning["tokens_less"] == -len(tokenizer("It is five.<|im_end|>")["input_ids"])
    assert plain["tokens_less"] == -len(plain["token_ids"])


def test_scorers_read_the_reasoning_as_well_where_that_is_wanted(folder):
    scorers = (LONG, "tokens_less=length", "words=length:words", "characters=length:characters")
    with_reasoning, plain = score(folder, *scorers, with_reasoning=True)[:2]
    assert (with_reasoning["long"], plain["long"]) == (len(BOTH), len("Five!"))
    assert with_reasoning["words"] == -len(BOTH.split())
    assert with_reasoning["characters"] == -len(BOTH)
    assert with_reasoning["tokens_less"] == -len(with_reasoning["token_ids"])
    assert "Scored by reasoning and answer: long, tokens_less, words, characters." in notes(
        find_front(Comparison(folder))
    )


def test_scores_of_answers_and_of_more_are_not_mixed(folder):
    score(folder, LONG)
    with pytest.raises(ConfigError, match=r"long: its scores were computed by .*length'}, without --with-reasoning"):
        score(folder, LONG, with_reasoning=True)
    assert score(folder, LONG, replace=True, with_reasoning=True)[0]["long"] == len(BOTH)
    with pytest.raises(ConfigError, match=r"long: its scores were computed by .*length'}, with --with-reasoning"):
        score(folder, LONG)
    assert score(folder, LONG, with_reasoning=True)[0]["long"] == len(BOTH)


def test_an_implicit_reward_is_of_all_tokens_anyway(folder, models, tmp_path):
    run = save_run(models[THINKS], tmp_path / "run", 1)
    scorer = f"safer={{source: adapter, path: {run}, beta: 0.3}}"
    with pytest.raises(ConfigError, match="--with-reasoning has no effect on these scorers"):
        score(folder, scorer, with_reasoning=True)
    alone = score(folder, scorer)[0]["safer"]
    both = score(folder, scorer, LONG, with_reasoning=True)[0]
    assert (both["safer"], both["long"]) == (alone, len(BOTH))
    tuned, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (run, models[THINKS]))
    tokenizer = AutoTokenizer.from_pretrained(models[THINKS])
    own, other = (logp_by_hand(model, tokenizer, both) for model in (tuned, plain))
    assert alone == pytest.approx(0.3 * (own - other), abs=1e-3)


@pytest.mark.parametrize(
    ("template", "key"), [(THINKS, "reasoning_content"), (CHANNELS, "thinking"), (PLAIN + HEADER, None)]
)
def test_a_reward_model_reads_reasoning_in_its_own_form(folder, tmp_path, template, key):
    tokenizer = AutoTokenizer.from_pretrained(SMOKE / "model")
    tokenizer.chat_template = template
    model = save_reward_model(tmp_path / "reward", tokenizer, ["good"])

    def by_hand(row, answer, **more):
        turn = {"role": "assistant", "content": answer, **more}
        text = tokenizer.apply_chat_template([*row["prompt"], turn], tokenize=False)
        with torch.no_grad():
            return model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0].item()

    spec = f"{{source: reward_model, path: {tmp_path / 'reward'}, dtype: float32}}"
    row = score(folder, f"answer={spec}")[0]
    assert row["answer"] == pytest.approx(by_hand(row, "It is five."), abs=1e-5)
    row, plain = score(folder, f"both={spec}", with_reasoning=True)[:2]
    expected = by_hand(row, "It is five.", **{key: "Two."}) if key else by_hand(row, BOTH)
    assert row["both"] == pytest.approx(expected, abs=1e-5)
    assert abs(row["both"] - row["answer"]) > 1e-5
    assert plain["both"] == plain["answer"]


def test_a_reward_model_that_leaves_reasoning_out_is_named(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SMOKE / "model")
    tokenizer.chat_template = PLAIN.replace("m.content", "m.content.split('</think>')[-1]") + HEADER
    save_reward_model(tmp_path / "reward", tokenizer, ["good"])
    spec = f"both={{source: reward_model, path: {tmp_path / 'reward'}, dtype: float32}}"
    with pytest.raises(
        DataError, match="its chat template leaves out the reasoning of the response; score the answers"
    ):
        score(folder, spec, with_reasoning=True)


@pytest.fixture
def unanswered(models, folder, tmp_path):
    generated(tmp_path / "cut", models[THINKS], BOTH, "<think>\nTwo...")
    return tmp_path / "cut"


def test_a_response_without_an_answer_is_refused_or_scored_as_an_empty_one(unanswered):
    for scorer in (LONG, "brief=length"):
        with pytest.raises(
            ConfigError,
            match=r"the response of p to prompt 0, sample 1 \(and 1 more\) ended inside its reasoning and has no "
            r"answer; generate again with a larger --max-new-tokens, or score such responses as empty answers with",
        ):
            score(unanswered, scorer)
    assert not Comparison(unanswered).objectives
    rows = score(unanswered, LONG, "brief=length", empty_answers=True)
    assert [row["long"] for row in rows] == [11, 0, 11, 0]
    assert rows[1]["brief"] == 0
    score(unanswered, LONG)  # is scored already
    found = notes(find_front(Comparison(unanswered)))
    assert "Responses that ended inside their reasoning and have no answer: p 2." in found


def test_reasoning_alone_is_scored_where_scorers_read_it(unanswered):
    rows = score(unanswered, LONG, with_reasoning=True)
    assert rows[1]["long"] == len("<think>\nTwo\n</think>\n\n")


def test_a_response_that_is_empty_without_reasoning_is_scored_as_before(models, folder, tmp_path):
    generated(tmp_path / "empty", models[THINKS], "")
    assert score(tmp_path / "empty", LONG)[0]["long"] == 0


def test_a_model_of_another_vocabulary_reads_reasoning_in_its_own_form(models, tmp_path):
    row = {"prompt": user("Why?"), "token_ids": [7, 8], "prompt_id": 0}
    rows = [
        {**row, "sample": 0, "reasoning": "Two.", "response": "It is five.", "reasoning_tokens": 1, "finished": True},
        {**row, "sample": 1, "reasoning": "Two.", "response": "It is", "reasoning_tokens": 1, "finished": False},
        {**row, "sample": 2, "reasoning": "Two", "response": "", "reasoning_tokens": 2, "finished": False},
        {**row, "sample": 3, "response": "It is", "finished": False},
    ]
    inner, outer = "<|lane|>inner<|text|>", "<|over|><|im_start|>assistant<|lane|>outer<|text|>"
    expected = {
        CHANNELS: [f"{inner}Two.{outer}It is five.<|im_end|>", f"{inner}Two.{outer}It is", f"{inner}Two", "It is"],
        PLAIN + HEADER: [f"{BOTH}<|im_end|>", "<think>\nTwo.\n</think>\n\nIt is", "<think>\nTwo", "It is"],
    }
    for template, texts in expected.items():
        tokenizer = AutoTokenizer.from_pretrained(models[template])
        tokenizer.add_tokens(["hello"])
        folder = tmp_path / str(len(tokenizer))
        tokenizer.save_pretrained(folder)
        asked = _asked(rows, Policy("p", "x", tokenizer=str(models[THINKS])), Policy("m", "y", tokenizer=str(folder)))
        assert [tokenizer.decode(ids) for _, ids in asked] == texts


def test_a_scoring_model_is_asked_with_its_own_variables(models, tmp_path):
    rows = [{"prompt": CALLED, "response": "x", "token_ids": [7], "prompt_id": 0, "sample": 0, "finished": True}]
    rows[0]["tools"] = [TOOL]
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    run = save_run(models[THINKS], tmp_path / "run", 1)
    plain = Policy("m", "y", tokenizer=str(models[THINKS]))
    tokenizer = AutoTokenizer.from_pretrained(models[THINKS])

    def prompt(model, override=None, **policy):
        ((ids, _),) = _asked(rows, Policy("p", "x", tokenizer=str(models[THINKS]), **policy), model, override)
        return tokenizer.decode(ids)

    closed = "<think>\n\n</think>\n\n"
    assert '"parameters"' in prompt(plain)
    assert not prompt(plain).endswith(closed)
    assert prompt(plain, chat_template_kwargs=off).endswith(closed)  # it has no mopo.json
    assert not prompt(plain, on, chat_template_kwargs=off).endswith(closed)
    (trained,) = find_policies([str(run)])
    assert not prompt(trained, chat_template_kwargs=off).endswith(closed)
    write_manifest(MODPO, str(models[THINKS]), run, off)
    (trained,) = find_policies([str(run)])
    assert prompt(trained, on).endswith(closed)
    other = Policy("m", "y", tokenizer=str(models[PLAIN + HEADER]))
    rows[0] |= {"prompt": user("Why?"), "tools": []}
    assert prompt(other, chat_template_kwargs=off).endswith("assistant\n")  # another template, without the variable


def test_the_page_shows_the_answer_and_folds_the_reasoning(tmp_path, browser):  # noqa: F811 (a fixture)
    hostile = '</script><img src=x onerror="alert(1)"><b>bold</b>'
    made = comparison(tmp_path / "out", {"a": [[(1, 1)], [(2, 2)]]}, samples=1)
    asked = [[*CALLED[:1], {**CALLED[1], "reasoning_content": hostile}, CALLED[2]], user("Why?")]
    first, second = made.responses("a")
    first |= {"prompt": asked[0], "reasoning": hostile, "reasoning_tokens": 1, "response": "It is five."}
    second |= {"prompt": asked[1], "reasoning": "Two", "reasoning_tokens": 3, "response": ""}
    made.settings = made.settings.model_copy(
        update={"prompts": made.settings.prompts.model_copy(update={"digest": fingerprint(asked)})}
    )
    made.replace("a", [first, second])
    view, seen = opened(browser, render(find_front(made), made, prompts=2), tmp_path)
    answer = view.locator("#responses > .turn", has_text="It is five.")
    assert answer.is_visible()
    folded = view.locator("#responses details")
    assert folded.count() == 2
    for each in folded.all():
        assert not each.evaluate("each => each.open")
        each.locator("summary").click()
        assert hostile in each.inner_text()
    shown = view.locator("#responses").inner_text()
    assert '"name": "add"' in shown
    assert "null" not in shown
    view.get_by_role("button", name="Next").click()
    assert "no answer" in view.locator("#responses").inner_text()
    assert view.locator("img, b").count() == 0
    assert seen == []


def test_a_parser_of_ordinary_responses_finds_what_was_found_before(models):
    """Texts without marks are what they are without their special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(models[THINKS])
    parser = ReasoningParser(tokenizer, ChatRenderer(tokenizer))
    generator = torch.manual_seed(0)
    for _ in range(20):
        tokens = torch.randint(0, len(tokenizer), (12,), generator=generator).tolist()
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert parser.part("x", tokens, False) == (None, text, 0)


def test_a_stop_token_is_not_a_part_of_the_answer(models):
    """Even if it is not a special token."""
    tokenizer = AutoTokenizer.from_pretrained(models[THINKS])
    tokens = tokenizer("<think>Two.</think>It is five. End")["input_ids"]
    parser = ReasoningParser(tokenizer, ChatRenderer(tokenizer))
    assert parser.part("x", tokens, False)[:2] == ("Two.", "It is five. End")
    assert parser.part("x", tokens, True)[:2] == ("Two.", "It is five. End".removesuffix(tokenizer.decode(tokens[-1:])))


def test_an_empty_reasoning_is_not_written():
    assert joined("Two.", "Five.") == "<think>\nTwo.\n</think>\n\nFive."
    assert joined("", "Five.") == joined(None, "Five.") == "Five."

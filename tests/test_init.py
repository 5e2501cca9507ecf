"""`axolotl mopo init`: the formats it detects, the files it writes and what it refuses. Its configurations train."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner
from conftest import ROOT, SMOKE, axolotl
from datasets import Dataset, DatasetDict
from test_formats import ATTRIBUTES, GOOD

import axolotl_mopo.commands.init as init_module
from axolotl_mopo.cli import mopo
from axolotl_mopo.commands.recognition import COLUMNS, recognize, score_names
from axolotl_mopo.commands.starting_config import sequence_length
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.data.rows import RatedResponse, TemplateInputs
from axolotl_mopo.errors import DataError

SOURCE = [json.loads(line) for line in (SMOKE / "pairs.jsonl").read_text().splitlines()[:24]]
MODEL = str(SMOKE / "model")


def messages(*contents):
    return [{"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)]


def flat(row):
    scores = {
        f"{side}_{name}": value for side in ("chosen", "rejected") for name, value in row[f"{side}_scores"].items()
    }
    return {"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], **scores}


def conversations(row):
    return {
        "prompt": row["prompt"],
        "chosen": messages(row["prompt"], row["chosen"]),
        "rejected": messages(row["prompt"], row["rejected"]),
        "score_chosen": row["chosen_scores"]["helpfulness"] + 1.5,
        "score_rejected": row["rejected_scores"]["helpfulness"] + 1.0,
    }


def completions(row):
    sides = [(row[side], row[f"{side}_scores"]) for side in ("chosen", "rejected")]
    names = ("instruction_following", "helpfulness")
    return {
        "instruction": row["prompt"],
        "completions": [
            {
                "response": text,
                "overall_score": 2.0 + scores["helpfulness"],
                "annotations": {
                    **{name: {"Rating": str(1 + scores[name])} for name in names},
                    "honesty": {"Rating": str(1 + scores["correctness"])},
                    "truthfulness": {"Rating": "4"},
                },
            }
            for text, scores in sides
        ],
    }


def safety(row):
    number = int(row["prompt"].encode().hex(), 16)
    return {
        "prompt": row["prompt"],
        "response_0": row["chosen"],
        "response_1": row["rejected"],
        "is_response_0_safe": number % 2 == 0,
        "is_response_1_safe": number % 3 == 0,
        "better_response_id": number % 2,
        "safer_response_id": number % 3 % 2,
    }


def ratings(row):
    for side in ("chosen", "rejected"):
        scores = row[f"{side}_scores"]
        values = {**scores, "coherence": scores["correctness"], "complexity": 1}
        yield {"prompt": row["prompt"], "response": row[side], **{name: values[name] for name in ATTRIBUTES}}


def arena(row):
    sides = {"a": "rejected", "b": "chosen"}
    talks = {f"conversation_{name}": messages(row["prompt"], row[side]) for name, side in sides.items()}
    return {"question_id": "q", "model_a": "m", "model_b": "n", "winner": "model_b", **talks}


SHAPES = {
    "flat": [flat(row) for row in SOURCE],
    "conversations": [conversations(row) for row in SOURCE],
    "completions": [completions(row) for row in SOURCE],
    "safety": [safety(row) for row in SOURCE],
    "ratings": [each for row in SOURCE for each in ratings(row)],
    "arena": [arena(row) for row in SOURCE],
}


def run(*arguments, fails=False, **settings):
    result = CliRunner().invoke(mopo, ["init", *map(str, arguments)], **settings)
    assert (result.exit_code != 0) is fails, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.output


def write(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def init(tmp_path):
    """Run the command on rows; returns its output and the configuration that it wrote."""

    def made(rows, method, *arguments):
        data, config = write(rows, tmp_path / "data.jsonl"), tmp_path / "config.yaml"
        said = run("--method", method, "--data", data, "--base-model", MODEL, "-o", config, *arguments)
        return said, yaml.safe_load(config.read_text())

    return made


TRAINED = [
    ("modpo", "conversations"),
    ("modpo", "safety"),
    ("modpo", "arena"),
    ("amopo", "flat"),
    ("amopo", "completions"),
    ("amopo", "ratings"),
]


@pytest.mark.parametrize(("method", "shape"), TRAINED)
def test_what_is_written_trains(method, shape, init, tmp_path):
    init(SHAPES[shape], method)
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("max_steps: 2\nreinit_weights: true\n")
    axolotl("train", "config.yaml", "--launcher", "python", cwd=tmp_path)
    out = tmp_path / "outputs" / f"{method}-data"
    assert json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    assert (out / "adapter_model.safetensors").exists()
    assert json.loads((out / "mopo.json").read_text())["method"] == method


def test_the_commands_are_known_before_anything_heavy_is_imported():
    code = (
        "import sys, axolotl_mopo.cli; heavy = {'torch', 'transformers', 'datasets', 'axolotl'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_format_can_be_recognized():
    assert set(COLUMNS) == set(FORMATS)


@pytest.mark.parametrize("kind", GOOD)
def test_a_format_is_found_by_its_columns_alone(kind):
    assert recognize(Dataset.from_list([GOOD[kind]] * 3)).kind == kind


def test_scored_responses_are_ordered_by_a_column_that_rates_them():
    rows = [{"prompt": "p", "response": text, "run_id": n, "brief": n, "reward": -n} for n, text in enumerate("abc")]
    found = recognize(Dataset.from_list(rows))
    assert (found.kind, found.objective, len(found.pairs)) == ("responses", ("reward",), 3)
    assert score_names(found) == ["brief", "reward"]
    assert recognize(Dataset.from_list(rows), objective="brief").pairs[0].chosen.text == "b"


@pytest.mark.parametrize(
    ("shape", "method", "kind", "expected"),
    [
        ("flat", "modpo", "pairs", {"objective": "preference", "weights": {"preference": 0.5}}),
        ("conversations", "modpo", "pairs", {"weights": {"preference": 0.5, "score": 0.5}}),
        ("safety", "modpo", "safe_rlhf", {"weights": {"better": 0.5, "safer": 0.5}}),
        ("arena", "modpo", "arena", {"weights": {"preference": 0.8, "brevity": 0.2}}),
        ("completions", "modpo", "ultrafeedback", {"weights": {"helpfulness": 0.5, "honesty": 0.5}}),
        ("ratings", "modpo", "helpsteer", {"weights": {"helpfulness": 0.5, "verbosity": -0.5}}),
        ("conversations", "amopo", "pairs", {"dimensions": ["score"]}),
        ("safety", "amopo", "safe_rlhf", {"dimensions": ["safer", "safe"]}),
        ("ratings", "amopo", "helpsteer", {"dimensions": ["helpfulness", "correctness", "coherence"]}),
    ],
)
def test_scores_of_the_data_decide_what_is_trained_for(shape, method, kind, expected, init):
    said, cfg = init(SHAPES[shape], method)
    assert cfg["datasets"][0]["type"] == f"axolotl_mopo.{kind}"
    for key, value in expected.items():
        found = cfg[method][key]
        assert (found | value if isinstance(value, dict) else value) == found
    assert f"They are read as `type: axolotl_mopo.{kind}`" in said
    assert "axolotl mopo smoke" in said


def test_scores_that_conflict_most_with_the_label_become_margins_first(init):
    rows = [
        {"prompt": f"p{n}", "chosen": "a", "rejected": "b", "chosen_scores": one, "rejected_scores": other}
        for n in range(10)
        for one, other in [
            (
                {"agrees": 2 + n % 2, "half": n, "never": 0, "mostly": int(n > 2), "same": 3},
                {"agrees": 1, "half": 9 - n, "never": 1 + n % 3, "mostly": 0.5, "same": 3},
            )
        ]
    ]
    said, cfg = init(rows, "modpo")
    assert list(cfg["modpo"]["margins"]) == ["never", "half", "mostly"]
    assert cfg["modpo"]["weights"]["never"] == 0.17
    assert "Other scores are agrees." in said


def test_a_scale_is_guessed_from_all_scores_and_scores_of_another_scale_are_left_out(init):
    rows = [
        {"prompt": f"p{n}", "chosen": "a", "rejected": "b"}
        | {
            "chosen_a": n % 5,
            "rejected_a": 0,
            "chosen_b": (n + 1) % 5,
            "rejected_b": 4,
            "chosen_c": 60 + n,
            "rejected_c": n,
        }
        for n in range(10)
    ]
    _, cfg = init(rows, "amopo")
    assert cfg["amopo"]["dimensions"] == ["a", "b"]
    assert cfg["datasets"][0]["score_scale"] == [0, 4]


ODD = {
    "sides": {"field_chosen": "preferred_answer", "field_rejected": "dispreferred_answer"},
    "prompt": {"field_prompt": "query"},
    "system": {"field_system": "system_prompt"},
    "flat": {"field_chosen_scores": "{}_chosen", "field_rejected_scores": "{}_rejected"},
    "nested": {"field_chosen_scores": "chosen_ratings", "field_rejected_scores": "rejected_ratings"},
}


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        (
            {"preferred_model": "m", "dispreferred_model": "n", "prompt": "p"}
            | {"preferred_answer": "a", "dispreferred_answer": "b"},
            ["sides"],
        ),
        ({"query": "p", "preferred_answer": "a", "dispreferred_answer": "b"}, ["sides", "prompt"]),
        ({"query": "p", "chosen": "a", "rejected": "b"}, ["prompt"]),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "system_prompt": "Be kind."}, ["system"]),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "rating_chosen": 2, "rating_rejected": 1}, ["flat"]),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_ratings": {"h": 2}, "rejected_ratings": {"h": 1}},
            ["nested"],
        ),
    ],
)
def test_pairs_of_other_names_are_read_by_the_keys_of_pairs(row, keys):
    other = {name: value + 1 if isinstance(value, int) else value for name, value in row.items()}
    found = recognize(Dataset.from_list([row, other]))
    assert (found.kind, found.options) == ("pairs", {key: value for name in keys for key, value in ODD[name].items()})
    assert len(found.pairs) == 2
    assert bool(score_names(found)) is bool({"flat", "nested"} & set(keys))


def test_rows_of_one_split_are_read_where_the_data_holds_several():
    row = {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 1}
    found = recognize(Dataset.from_list([{**row, "split": split} for split in ("train", "val", "train")]))
    assert (found.kind, found.options, len(found.pairs)) == ("helpsteer2", {"where": {"split": "train"}}, 2)


def test_a_few_bad_rows_are_dropped_and_many_are_refused(init, tmp_path):
    good, bad = SHAPES["flat"][:20], {**SHAPES["flat"][0], "chosen": " "}
    _, cfg = init([*good, bad], "amopo")
    assert cfg["datasets"][0]["on_bad_row"] == "drop"
    assert "# 1 of the first 21 rows" in (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").unlink()
    data = write([*good, bad, bad, bad], tmp_path / "data.jsonl")
    said = run("--method", "amopo", "--data", data, "--base-model", MODEL, "-o", tmp_path / "config.yaml", fails=True)
    assert "row 20: its `chosen` is an empty response" in said
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "completion": "a", "label": True}], "Its columns are prompt, completion, label."),
        (
            [{"instruction": "p", "input": "q", "chosen": "a", "rejected": "b"}],
            "`instruction` or `input`; name its col",
        ),
        ([{"query": "p", "context": "q", "chosen": "a", "rejected": "b"}], "it has no prompt: no column"),
        ([{"prompt": "p", "chosen": "a", "rejected": "a"}], "its chosen and rejected responses are the same text"),
    ],
)
def test_data_that_no_format_reads_is_refused_with_its_columns_and_the_formats(rows, message):
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        recognize(Dataset.from_list(rows))
    assert "helpsteer3: context, response1, response2, overall_preference" in str(refused.value)
    assert "Its columns are" in str(refused.value)


def test_a_named_type_and_named_columns_are_all_that_is_tried(init):
    row = {"instruction": "p", "input": "q", "chosen": "a", "rejected": "b"}
    _, cfg = init([row, {**row, "chosen": "c"}], "modpo", "--field-prompt", "input")
    assert cfg["datasets"][0]["field_prompt"] == "input"
    with pytest.raises(DataError, match="hh_rlhf: the data, row 0: its `chosen` must begin with a turn") as refused:
        recognize(Dataset.from_list([row]), "hh_rlhf")
    assert "helpsteer3" not in str(refused.value)


def test_amopo_without_scores_is_refused_with_what_to_do(tmp_path):
    data = write(SHAPES["arena"], tmp_path / "data.jsonl")
    said = run(
        "--method", "amopo", "--data", data, "--base-model", MODEL, "-o", tmp_path / "new" / "c.yaml", fails=True
    )
    assert "AMoPO needs scores of the responses" in said
    assert "--method modpo" in said
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten_and_local_paths_must_be_there(tmp_path):
    data, config = write(SHAPES["flat"], tmp_path / "data.jsonl"), tmp_path / "config.yaml"
    config.write_text("mine")
    arguments = ("--method", "modpo", "-o", config)
    assert "exists already" in run(*arguments, "--data", data, "--base-model", MODEL, fails=True)
    assert config.read_text() == "mine"
    config.unlink()
    for given in ((tmp_path / "none.jsonl", MODEL), (data, tmp_path / "no" / "model"), ("nowhere.parquet", MODEL)):
        said = run(*arguments, "--data", given[0], "--base-model", given[1], fails=True)
        assert "there is no file or folder" in said
    assert not config.exists()


def test_what_is_missing_is_asked_for_in_a_terminal_and_named_without_one(tmp_path, monkeypatch):
    data, config = write(SHAPES["flat"], tmp_path / "data.jsonl"), tmp_path / "config.yaml"
    assert "Missing option '--method'" in run("--data", data, "-o", config, fails=True)
    monkeypatch.setattr(init_module, "_is_terminal", lambda: True)
    said = run("-o", config, input=f"amopo\n{data}\n{MODEL}\n")
    assert "Method (modpo, amopo)" in said
    assert yaml.safe_load(config.read_text())["rl"] == "amopo"


def test_columns_may_have_any_name(init):
    rows = [
        {
            "prompt": f"p{n}",
            "chosen": "a",
            "rejected": "b",
            "chosen_x: #1": n % 5,
            "rejected_x: #1": 0,
            "chosen_no": n % 3,
        }
        | {"rejected_no": 2}
        for n in range(9)
    ]
    _, cfg = init(rows, "modpo")
    assert set(cfg["modpo"]["margins"]) == {"x: #1", "no"}


def test_every_key_is_explained_and_the_chat_template_of_a_local_model_is_known(init, tmp_path):
    init(SHAPES["flat"], "amopo")
    text = (tmp_path / "config.yaml").read_text()
    assert "chat_template" not in text
    blocks = re.split("\n\n+", text)
    assert all(block.startswith("#") or block.startswith("datasets:") for block in blocks)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer_config.json").write_text("{}")
    for model, line in ((bare, "chat_template: chatml"), ("some/model", "# chat_template: chatml")):
        (tmp_path / "config.yaml").unlink()
        run(
            "--method",
            "modpo",
            "--data",
            tmp_path / "data.jsonl",
            "--base-model",
            model,
            "-o",
            tmp_path / "config.yaml",
        )
        assert line in (tmp_path / "config.yaml").read_text().splitlines()


def test_sequence_len_holds_all_but_the_longest_hundredth():
    rows = [{"prompt": "p" * 400, "chosen": "c" * (2400 if n else 40_000), "rejected": "r" * 400} for n in range(200)]
    pairs = recognize(Dataset.from_list(rows)).pairs
    assert sequence_length(pairs, "modpo") == (1024, 700)
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "x" * 4000}}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "y" * 4000}]
    calling = replace(pairs[0], chosen=RatedResponse("", {}, turns), inputs=TemplateInputs([{"name": "z" * 4000}]))
    assert 3050 < sequence_length([calling], "modpo")[1] < 3200
    assert sequence_length([*pairs[:1]], "amopo")[0] == 4096


def test_splits_and_saved_data_sets_are_read_as_axolotl_reads_them(tmp_path):
    table = Dataset.from_list(SHAPES["flat"])
    DatasetDict(train=table, test=table).save_to_disk(tmp_path / "saved")
    arguments = ("--method", "modpo", "--data", tmp_path / "saved", "--base-model", MODEL, "-o", tmp_path / "c.yaml")
    assert "remove --split" in run(*arguments, "--split", "test", fails=True)
    run(*arguments)
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["datasets"][0]["split"] == "train"

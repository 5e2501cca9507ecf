"""`axolotl mopo pairs` and `axolotl mopo directives`, and the notes on prepared rows."""

import json

import pytest
import yaml
from click.testing import CliRunner
from conftest import prepare, smoke_config
from datasets import Dataset, load_dataset
from test_formats import canonical, rated, read
from test_pairing import helpsteer_rows
from transformers import AutoTokenizer

from axolotl_mopo.cli import mopo
from axolotl_mopo.config import Directives
from axolotl_mopo.training.warnings import row_warnings

HELPFULNESS = ("--type", "helpsteer", "--objective", "helpfulness")


def run(*arguments, fails=False):
    result = CliRunner().invoke(mopo, [str(argument) for argument in arguments])
    assert (result.exit_code != 0) is fails, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)  # no traceback
    return result.output


@pytest.fixture(scope="module")
def rows():
    return helpsteer_rows(200)


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet", "folder", "saved", "saved splits"])
def source(request, rows, tmp_path):
    table = Dataset.from_list(rows)
    path = tmp_path / f"raw.{request.param}"
    match request.param:
        case "jsonl":
            table.to_json(path)
        case "jsonl.gz":
            table.to_json(path, compression="gzip")
        case "parquet":
            table.to_parquet(path)
        case "folder":
            (path / "data").mkdir(parents=True)
            table.to_parquet(path / "data" / "train.parquet")
        case "saved":
            table.save_to_disk(path)
        case _:
            from datasets import DatasetDict

            DatasetDict(train=table).save_to_disk(path)
    return path


def test_pairs_of_every_kind_of_source(source, rows, tmp_path):
    output = run("pairs", source, *HELPFULNESS, "--output", tmp_path / "out.jsonl")
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert made == read("helpsteer", rows, objective=("helpfulness",))[0]
    assert f"200 rows read\n{len(made)} pairs made" in output
    assert list(tmp_path.glob("out*")) == [tmp_path / "out.jsonl"]


def test_what_is_written_is_read_by_the_strategy_pairs(rows, tmp_path, tokenizer):
    Dataset.from_list(rows).to_json(tmp_path / "raw.jsonl")
    expected = prepare(rows, tokenizer, kind="helpsteer", score_range=[1, 5])
    for name in ("out.jsonl", "out.parquet"):
        output = run("pairs", tmp_path / "raw.jsonl", *HELPFULNESS, "-o", tmp_path / name)
        (entry,) = yaml.safe_load(output.split("put this in the YAML:\n\n")[1])["datasets"]
        assert entry.pop("path") == str(tmp_path / name)
        table = load_dataset(entry.pop("ds_type", "parquet"), data_files=str(tmp_path / name), split="train")
        assert entry.pop("type") == "axolotl_mopo.pairs"
        assert prepare(table.to_list(), tokenizer, score_range=[1, 5], entry=entry) == expected


def test_attributes_and_their_conflicts(tmp_path):
    scores = [(4, 1, 1, 1, 1), (3, 2, 1, 1, 1), (2, 0, 1, 1, 1)]
    Dataset.from_list([rated(f"r{i}", *score) for i, score in enumerate(scores)]).to_json(tmp_path / "raw.jsonl")
    arguments = ("--attributes", "helpfulness,correctness", "-o", tmp_path / "out.parquet")
    output = run("pairs", tmp_path / "raw.jsonl", *HELPFULNESS, *arguments)
    table = Dataset.from_parquet(str(tmp_path / "out.parquet"))
    assert table[0]["chosen_scores"] == {"helpfulness": 4, "correctness": 1}
    matrix = [line.split() for line in output.splitlines() if line.strip().startswith(("label ", "correctness "))]
    assert matrix[0] == ["label", "helpfulness", "correctness"]
    assert matrix[1] == ["label", "100.0", "100.0", "66.7"]
    assert matrix[2] == ["correctness", "66.7", "66.7", "100.0"]


def test_the_options_of_pairs(tmp_path, rows):
    Dataset.from_list(rows).to_json(tmp_path / "raw.jsonl")
    first = run("pairs", tmp_path / "raw.jsonl", *HELPFULNESS, "-o", tmp_path / "a.jsonl", "--split", "train[:50]")
    assert "50 rows read" in first
    capped = ("--max-pairs-per-prompt", "1", "--seed")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("pairs", tmp_path / "raw.jsonl", *HELPFULNESS, "-o", tmp_path / f"{name}.jsonl", *capped, seed)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b != c
    named = [{"q": "p", "good": "a", "bad": "b"}]
    Dataset.from_list(named).to_json(tmp_path / "named.jsonl")
    fields = ("--field-prompt", "q", "--field-chosen", "good", "--field-rejected", "bad")
    run("pairs", tmp_path / "named.jsonl", "--type", "pairs", *fields, "-o", tmp_path / "d.jsonl")
    assert json.loads((tmp_path / "d.jsonl").read_text()) == canonical("a", "b", [{"role": "user", "content": "p"}])


def pairs_of(kind, rows, tmp_path, *arguments):
    """The pairs that the command writes, and what it says."""
    Dataset.from_list(rows).to_json(tmp_path / "raw.jsonl")
    output = run("pairs", tmp_path / "raw.jsonl", "--type", kind, "-o", tmp_path / "out.jsonl", *arguments)
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], output


def test_rows_are_chosen_by_the_values_of_their_columns(tmp_path):
    row = {"prompt": "p", "rejected": "b"}
    rows = [{**row, "chosen": f"c{n}", "split": split, "n": n} for n, split in enumerate(["val", "train", "val"])]
    made, output = pairs_of("pairs", rows, tmp_path, "--where", "split=val", "--where", "n=2")
    assert [pair["chosen"] for pair in made] == ["c2"]
    assert "1 rows whose `n` is not '2' left out\n1 rows whose `split` is not 'val' left out" in output
    for wrong in ("split", "=val"):
        assert "is not COLUMN=VALUE" in run("pairs", "x", "--type", "pairs", "-o", "y", "--where", wrong, fails=True)
    arguments = ("--type", "pairs", "-o", tmp_path / "out.jsonl", "--where", "spilt=val")
    output = run("pairs", tmp_path / "raw.jsonl", *arguments, fails=True)
    assert "`where` names the column spilt, which does not exist" in output


def test_responses_that_were_cut_off_are_kept_where_one_asks(tmp_path):
    common = {"prompt": "p", "finished": False}
    rows = [{**common, "response": f"r{n}", "nice": float(n)} for n in range(3)] + [
        {**common, "response": f"r{n}", "nice": float(n), "finished": True} for n in (3, 4)
    ]
    assert len(pairs_of("responses", rows, tmp_path, "--objective", "nice")[0]) == 1
    assert len(pairs_of("responses", rows, tmp_path, "--objective", "nice", "--keep-unfinished")[0]) == 10


def test_ratings_and_a_ratio_of_votes_are_options_too(tmp_path):
    Dataset.from_list([rated("A", 1, 2, 3, 4, 0), rated("B", 4, 4, 4, 4, 4)]).to_parquet(tmp_path / "ratings.parquet")
    row = {"prompt": "Why is the sky blue?", "response_1": "A", "response_2": "B", "preference_strength": -1}
    made, _ = pairs_of("helpsteer2", [row], tmp_path, "--ratings", str(tmp_path / "ratings.parquet"))
    assert made[0]["chosen_scores"]["overall"] == 2
    row = {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    rows = [{**row, "score_ratio": ratio} for ratio in (1.5, 3.0)]
    made, output = pairs_of("shp", rows, tmp_path, "--min-score-ratio", "2")
    assert len(made) == 1
    assert "1 pairs whose score_ratio is below 2 left out" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*HELPFULNESS, "--keep-unfinished"], ["--keep-unfinished has no effect with --type helpsteer"]),
        ([*HELPFULNESS, "--ratings", "x"], ["--ratings has no effect with --type helpsteer"]),
        ([*HELPFULNESS, "--min-score-ratio", "2"], ["--min-score-ratio has no effect with --type helpsteer"]),
        (["--type", "shp", "--min-score-ratio", "0.5"], ["min_score_ratio", "a number of at least 1"]),
        (["--type", "helpsteer"], ["--objective: name one of", "helpfulness"]),
        (["--type", "helpsteer", "--objective", "beauty"], ["--objective: beauty cannot order the pairs"]),
        (
            ["--type", "shp", "--objective", "better"],
            ["--objective: the pairs are ordered by the data's own label"],
        ),
        (["--type", "shp"], ["raw.jsonl, row 0: it has no column `human_ref_A`", "on_bad_row: drop"]),
        (["--type", "shp", "--on-bad-row", "drop"], ["no pair could be made", "4 bad rows", "4 missing column"]),
        ([*HELPFULNESS, "--attributes", "beauty"], ["no pair has a score of beauty", "coherence"]),
        ([*HELPFULNESS, "--split", "test"], ["raw.jsonl, split test, cannot be loaded"]),
        (
            ["--type", "helpsteer", "--objective", "overall,overall"],
            ["'overall,overall' has a repeated or an empty name"],
        ),
        ([*HELPFULNESS, "--field-prompt", "q"], ["--field-prompt has no effect with --type helpsteer"]),
        ([*HELPFULNESS, "--name", "x"], ["which has no name, data files or revision"]),
        ([*HELPFULNESS, "-o", "/"], ["/: unknown file type"]),
        ([*HELPFULNESS, "-o", "/dev/null/pairs.jsonl"], ["/dev/null"]),
        ([*HELPFULNESS, "-o", "pairs.csv"], ["pairs.csv: unknown file type; use .jsonl or .parquet"]),
    ],
)
def test_wrong_options_leave_no_file(arguments, words, tmp_path):
    Dataset.from_list(helpsteer_rows(4)).to_json(tmp_path / "raw.jsonl")
    output = run("pairs", tmp_path / "raw.jsonl", "-o", tmp_path / "out.jsonl", *arguments, fails=True)
    for word in words:
        assert word in output
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


def test_a_saved_data_set_has_whole_splits(tmp_path):
    Dataset.from_list(helpsteer_rows(4)).save_to_disk(tmp_path / "saved")
    for split in ("test", "train[:2]"):
        arguments = (*HELPFULNESS, "-o", tmp_path / "out.jsonl", "--split", split)
        assert f"has no split {split}" in run("pairs", tmp_path / "saved", *arguments, fails=True)


def test_scores_of_several_scales_are_told(tmp_path):
    ratings = {name: {"Rating": "3"} for name in ("instruction_following", "honesty", "truthfulness", "helpfulness")}
    completions = [{"response": f"r{i}", "overall_score": float(i), "annotations": ratings} for i in range(1, 4)]
    Dataset.from_list([{"instruction": "q", "completions": completions}]).to_json(tmp_path / "raw.jsonl")
    arguments = ("--type", "ultrafeedback", "--objective", "overall", "-o", tmp_path / "o # ut.jsonl")
    output = run("pairs", tmp_path / "raw.jsonl", *arguments)
    assert "# The scores have different scales" in output
    (entry,) = yaml.safe_load(output.split("put this in the YAML:\n\n")[1])["datasets"]
    assert entry == {"path": str(tmp_path / "o # ut.jsonl"), "type": "axolotl_mopo.pairs", "ds_type": "json"}


def test_parquet_keeps_scores_that_one_side_has(tmp_path):
    scores = {"chosen_scores": {"x": 1}, "rejected_scores": {"x": 2, "y": 1}}
    (tmp_path / "raw.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", **scores}))
    run("pairs", tmp_path / "raw.jsonl", "--type", "pairs", "-o", tmp_path / "out.parquet")
    (made,) = Dataset.from_parquet(str(tmp_path / "out.parquet"))
    assert (made["chosen_scores"], made["rejected_scores"]) == ({"x": 1, "y": None}, {"x": 2, "y": 1})


def test_an_unknown_source_is_named(tmp_path):
    (tmp_path / "raw.doc").write_text("x")
    output = run("pairs", tmp_path / "raw.doc", *HELPFULNESS, "-o", tmp_path / "out.jsonl", fails=True)
    assert "raw.doc: unknown file type; known types are .json," in output
    output = run("pairs", tmp_path / "nowhere", *HELPFULNESS, "-o", tmp_path / "out.jsonl", fails=True)
    assert "nowhere, split train, cannot be loaded" in output


DIMENSIONS = ["helpfulness", "correctness", "instruction_following"]


@pytest.fixture
def config(tmp_path):
    def write(method, **overrides):
        path = tmp_path / f"{method}.yaml"
        path.write_text(yaml.safe_dump(smoke_config(method, tmp_path, **overrides)))
        return path

    return write


def shown(config, *arguments, tmp_path):
    run("directives", config, *arguments, "-o", tmp_path / "shown")
    return (tmp_path / "shown").read_text()


def test_directives_shows_what_a_row_is_trained_with(config, tmp_path, tokenizer):
    text = shown(config("amopo"), "--row", "7", "--json", tmp_path=tmp_path)
    training = json.loads(text)["training"]
    raw = load_dataset("json", data_files=smoke_config("amopo", tmp_path)["datasets"][0]["path"], split="train")
    (prepared,) = prepare([raw[7]], tokenizer, dimensions=DIMENSIONS, score_range=[1, 5], entry={"score_scale": [0, 4]})
    assert [prompt["name"] for prompt in training] == ["integrated", *DIMENSIONS]
    assert [prompt["text"] for prompt in training] == [tokenizer.decode(ids) for ids in prepared["prompt_input_ids"]]
    for prompt in training:
        rendered = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
        assert rendered == prompt["text"]


def test_directives_for_a_question(config, tmp_path):
    path = config("amopo")
    integrated = Directives().for_all(DIMENSIONS, (1, 5))
    inference = json.loads(shown(path, "--question", "Why?", "--json", tmp_path=tmp_path))["inference"]
    assert inference["messages"] == [{"role": "user", "content": f"{integrated}\n\nWhy?"}]
    assert inference["user_template"].replace("{question}", "Why?") == f"{integrated}\n\nWhy?"
    chosen = ("--question", "Why?", "--dimension", "correctness", "--score", "3")
    directive = Directives().for_one("correctness", 3, DIMENSIONS, (1, 5))
    text = shown(path, *chosen, tmp_path=tmp_path)
    assert text.endswith(
        f"=== inference: correctness\n<|im_start|>user\n{directive}\n\nWhy?<|im_end|>\n<|im_start|>assistant\n\n"
    )
    assert text.count("=== training: ") == 4


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize(
    "earlier",
    [
        [],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
        ],
    ],
)
def test_the_chat_template_puts_the_directive_in_by_itself(config, tmp_path, tokenizer, earlier, position):
    sentence = 'Mind "{% raw %}{{x}}{% endraw %}" \\ and 日本 🙂,\nplease: {{ dimensions | join }}'
    block = {"dimensions": ["helpfulness"], "directives": {"integrated": sentence}, "directive_position": position}
    path = config("amopo", amopo=block)
    template = shown(path, "--question", "Why?", "--template", tmp_path=tmp_path)
    directive = 'Mind "{{x}}" \\ and 日本 🙂,\nplease: helpfulness'
    with_template = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    with_template.chat_template = template
    question, asked = (
        [*earlier, {"role": "user", "content": content}]
        for content in ("Why?", f"{directive}\n\nWhy?" if position == "before" else f"Why?\n\n{directive}")
    )
    served = with_template.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert served == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("method", "arguments", "overrides", "words"),
    [
        ("modpo", [], {}, "has no `amopo:` block"),
        ("amopo", ["--dataset", "1"], {}, "there are 1 entries, counted from 0"),
        ("amopo", ["--row", "320"], {}, "there is no pair from row 320 on, in 320 rows; lower --row"),
        (
            "amopo",
            ["--question", "x", "--dimension", "beauty"],
            {},
            "unknown dimension beauty; use one of helpfulness,",
        ),
        ("amopo", ["--question", "x", "--dimension", "correctness", "--score", "9"], {}, "outside `score_range`"),
        ("amopo", ["--question", "x", "--score", "3"], {}, "a score needs a dimension"),
        (
            "amopo",
            ["--question", "x"],
            {"amopo": {"dimensions": ["helpfulness"], "integrated": False}},
            "`integrated` is false",
        ),
    ],
)
def test_directives_says_what_it_cannot_show(config, method, arguments, overrides, words):
    assert words in run("directives", config(method, **overrides), *arguments, fails=True)


@pytest.mark.parametrize("content", ["a: [", "- 1", "rl: amopo"])
def test_a_yaml_that_is_none_is_told_without_a_traceback(tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    assert "Error: " in run("directives", tmp_path / "bad.yaml", fails=True)


def test_missing_data_are_told_without_a_traceback(config):
    missing = [{"path": "nowhere/x.jsonl", "type": "axolotl_mopo.pairs"}]
    assert "Error: " in run("directives", config("amopo", datasets=missing, test_datasets=None), fails=True)


def prepared_rows(keys, cut_prompts=0, cut_completions=0):
    rows = [{"prompt_key": key, "cut_prompt_tokens": 0, "cut_completion_tokens": 0} for key in keys]
    for index in range(cut_prompts):
        rows[index]["cut_prompt_tokens"] = 10 * (index + 1)
    for index in range(cut_completions):
        rows[index]["cut_completion_tokens"] = 5
    return Dataset.from_list(rows)


def test_notes_on_what_was_cut_and_on_prompts_in_both_sets():
    assert list(row_warnings(prepared_rows(range(5)), prepared_rows(range(5, 9)))) == []
    assert list(row_warnings(prepared_rows(range(5)), None)) == []
    said = list(row_warnings(prepared_rows(range(5), cut_prompts=3), prepared_rows([1, 4, 7], cut_completions=1)))
    assert said[0].startswith(
        "3 of 5 training pairs have prompts that were truncated to fit into sequence_len, by 20 tokens"
    )
    assert said[1].startswith("1 of 3 evaluation pairs have completions that were truncated")
    assert said[2].startswith("2 of 3 evaluation pairs have a prompt that is also in the training set")

"""Data files that cannot be read are refused with their name, the reason and how to fix it, and none is guessed at."""

import bz2
import gzip
import json
import lzma
import os

import pytest
from conftest import smoke_config
from datasets import Dataset, load_dataset
from test_tools import run

from axolotl_mopo.data import tables
from axolotl_mopo.data.file_checks import data_fault, file_fault
from axolotl_mopo.data.tables import load_table
from axolotl_mopo.errors import ConfigError, DataError
from axolotl_mopo.evaluation.prompts import read_prompts
from axolotl_mopo.plugin import MOPOPlugin

LINE = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n"
TWICE = '{"prompt": "p", "chosen": "a", "chosen": "b"}\n'
HALF = LINE + LINE[:20]
SURROGATE = json.dumps({"prompt": "p \U0001f600 \udc9f", "chosen": "a", "rejected": "b"}) + "\n"
FAULTY = {
    "half.jsonl": (HALF, ["is not valid JSON in line 2", "fix or remove the line"]),
    "utf-16.jsonl": (LINE.encode("utf-16"), ["is not UTF-8 from line 1 on", "iconv"]),
    "twice.jsonl": (LINE + TWICE, ["has the key 'chosen' twice in one JSON object in line 2; rename or remove one"]),
    "twice.json": (f"[{LINE.strip()},\n{TWICE}]", ["has the key 'chosen' twice in one JSON object in line 2; rename"]),
    "one.json": (f"\n{TWICE}", ["has the key 'chosen' twice in one JSON object in line 2; rename or remove one"]),
    "lone.jsonl": (
        LINE + SURROGATE,
        ["contains the lone surrogate '\\udc9f' in line 2, which is not valid Unicode text; remove"],
    ),
    "lone.json": (f"[{LINE},{SURROGATE}]", ["contains the lone surrogate '\\udc9f' in row 1, which is not valid Uni"]),
    "deep.jsonl": (
        '{"prompt": [{"role": "user", "role": "user"}]}',
        ["the key 'role' twice in one JSON object in line 1"],
    ),
    "empty.jsonl": ("", ["is empty"]),
    "empty.jsonl.gz": (gzip.compress(b""), ["is empty"]),
    "half.jsonl.gz": (gzip.compress(HALF.encode()), ["is not valid JSON in line 2"]),
    "cut.jsonl.gz": (
        gzip.compress(LINE.encode() * 99)[:40],
        ["is not a .gz file, or is incomplete", "download it"],
    ),
    "text.jsonl.gz": (LINE, ["is not a .gz file, or is incomplete (Not a gzipped file"]),
    "text.jsonl.zst": (LINE, ["is not a .zst file, or is incomplete"]),
    "text.jsonl.xz": (LINE, ["is not a .xz file, or is incomplete"]),
    "text.jsonl.bz2": (LINE, ["is not a .bz2 file, or is incomplete"]),
    "text.parquet": (LINE, ["is not a Parquet file, or is incomplete"]),
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("place", ["file", "folder", "data file", "pattern", "two files"])
@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_file_is_named_wherever_it_stands(name, place, tmp_path):
    content, words = FAULTY[name]
    path = write(tmp_path / "data" / name, content)
    settings = {}
    if place == "file":
        source = path
    elif place == "two files":
        source, settings = "json", {"data_files": [str(write(tmp_path / "good.jsonl", LINE)), str(path)]}
    else:
        source = path.parent
        settings = {"data file": {"data_files": [name]}, "pattern": {"data_files": ["*" + name[2:]]}}.get(place, {})
    with pytest.raises(DataError) as caught:
        load_table(str(source), **settings)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_the_commands_that_read_pairs_and_prompts_say_which_file_is_faulty(tmp_path):
    path = write(tmp_path / "half.jsonl", HALF)
    output = run("pairs", path, "--type", "pairs", "-o", tmp_path / "out.jsonl", fails=True)
    assert f"Error: {path} is not valid JSON in line 2" in output
    with pytest.raises(DataError, match=f"^{path} is not valid JSON in line 2"):
        read_prompts(str(path))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_whole_compressed_file_has_no_fault(compress, tmp_path):
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    path = write(tmp_path / f"rows.jsonl.{suffix}", compress(LINE.encode() * 3))
    assert file_fault(path) is None
    assert len(load_table(str(path))) == 3


def test_a_file_is_probed_no_further_than_its_limit(tmp_path):
    path = write(tmp_path / "rows.jsonl", LINE * 9 + TWICE)
    assert file_fault(path, limit=5 * len(LINE)) is None
    assert "twice" in file_fault(path)


def test_what_is_hidden_in_a_folder_is_not_read(tmp_path):
    write(tmp_path / "rows.jsonl", LINE)
    write(tmp_path / ".cache" / "part.jsonl", "{")
    write(tmp_path / "__old" / "part.jsonl", "{")
    assert len(load_table(str(tmp_path))) == 1


@pytest.mark.parametrize(
    ("data", "others"),
    [
        ("data/train-00000-of-00001.parquet", ["meta.json"]),
        ("train.parquet", ["labels.json"]),
        ("train.parquet", ["test.parquet", "labels.json"]),
    ],
)
def test_what_stands_beside_the_data_of_a_folder_has_no_fault(tmp_path, data, others):
    """As `datasets` reads it: the files in `data`, or those of the main kind."""
    for name in (data, *others):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".parquet":
            Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}]).to_parquet(path)
        else:
            path.write_text('["a", "b"]')
    assert data_fault(tmp_path) is None
    assert len(load_table(str(tmp_path))) == 1
    (tmp_path / "b.json").mkdir()
    (tmp_path / data).write_bytes(b"PAR1 broken")
    if len(others) != 1 or data.startswith("data"):
        assert "is not a Parquet file" in data_fault(tmp_path)


def test_a_pipe_and_a_device_are_refused_and_not_waited_for(tmp_path):
    pipe, words = tmp_path / "pipe.jsonl", "is a pipe or a device, and not a file; write its content to a file first"
    os.mkfifo(pipe)
    for source, settings in ((pipe, {}), ("json", {"data_files": [str(pipe)]}), ("/dev/zero", {})):
        with pytest.raises(DataError, match=words):
            load_table(str(source), **settings)
    cfg = smoke_config("modpo", tmp_path)
    cfg["datasets"][0]["path"] = str(pipe)
    with pytest.raises(ConfigError, match=rf"`datasets\[0\]`: {pipe} {words}"):
        MOPOPlugin().register(cfg)


def test_a_faulty_file_of_an_entry_is_named_in_a_folder_and_behind_a_pattern(tmp_path):
    path = write(tmp_path / "data" / "twice.jsonl", TWICE)
    for entry in ({"path": str(path.parent)}, {"path": "json", "data_files": [str(path.parent / "*.jsonl")]}):
        cfg = smoke_config("modpo", tmp_path)
        cfg["datasets"][0] |= entry
        with pytest.raises(ConfigError, match=rf"`datasets\[0\]`: {path} has the key 'chosen' twice"):
            MOPOPlugin().register(cfg)


def test_files_of_several_shapes_are_told_by_their_columns(tmp_path):
    write(tmp_path / "a.jsonl", LINE)
    write(tmp_path / "b.jsonl", '{"question": "q"}\n')
    with pytest.raises(DataError) as caught:
        load_table(str(tmp_path))
    for word in (
        f"{tmp_path}, split train, cannot be loaded: its files do not have the same columns: one has",
        "question",
    ):
        assert word in str(caught.value)
    assert "an error occurred" not in str(caught.value).lower()


def test_the_reason_is_the_cause_that_says_something(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", LINE)

    def failing(*arguments, **settings):
        try:
            raise ValueError("the disk is gone")
        except ValueError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr(tables, "load_dataset", failing)
    with pytest.raises(
        DataError, match=r"rows.jsonl, split train, cannot be loaded: the disk is gone; check the split, and that its"
    ):
        load_table(str(path))

    def silent(*arguments, **settings):
        raise StopIteration

    monkeypatch.setattr(tables, "load_dataset", silent)
    with pytest.raises(DataError, match=r"it has no readable rows \(StopIteration\); check the split, and"):
        load_table(str(path))


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a?[x].jsonl"])
def test_a_file_whose_name_holds_glob_characters_is_read_and_no_other(name, tmp_path, monkeypatch):
    path = write(tmp_path / name, LINE)
    write(tmp_path / "a1.jsonl", LINE * 2)
    write(tmp_path / "ax.jsonl", LINE * 2)
    assert len(load_table(str(path))) == 1
    assert len(load_table(str(tmp_path), data_files=[name])) == 1
    assert len(load_table("json", data_files=[str(path)])) == 1
    monkeypatch.chdir(tmp_path)
    assert len(load_table("json", data_files=[name])) == 1
    assert len(load_table(str(tmp_path), data_files=["a[1x].jsonl"])) == 4
    run("pairs", path, "--type", "pairs", "-o", tmp_path / "out[1].jsonl")
    assert len(load_dataset("json", data_files=str(tmp_path / "out[[]1].jsonl"), split="train")) == 1


def test_a_file_that_axolotl_would_take_for_a_pattern_is_refused_in_a_configuration(tmp_path):
    path = write(tmp_path / "a[1].jsonl", LINE)
    for entry in ({"path": str(path)}, {"path": "json", "data_files": [str(path)]}):
        cfg = smoke_config("modpo", tmp_path)
        cfg["datasets"][0] |= entry
        with pytest.raises(ConfigError, match=r"`datasets\[0\]`: Axolotl reads .*a\[1\].jsonl as a pattern.* rename"):
            MOPOPlugin().register(cfg)

"""Comparison folders from strangers: errors name what is wrong, and no file outside the folder is touched."""

import json
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import matplotlib
import pytest
import yaml
from click.testing import CliRunner
from test_front import COST, HELPFUL, comparison
from test_security import Seen

from axolotl_mopo.cli import mopo
from axolotl_mopo.digests import digest
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.comparison import Comparison, _partial_file
from axolotl_mopo.evaluation.scoring import parse_scorer
from axolotl_mopo.files import Folder

FOLDERS = yaml.safe_load((Path(__file__).parent / "broken" / "folders.yaml").read_text(encoding="utf-8"))
REWARDS = {
    "a": [[(4, 2), (2, 0)], [(3, 1), (3, 1)]],
    "b": [[(2, 0), (2, 0)], [(2, 0), (1, 0)]],
    "reference": [[(3, 1), (1, 1)], [(2, 1), (2, 1)]],
}
JUDGE = """
def length(prompts, responses):
    return [float(len(response)) for response in responses]
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    (tmp_path / "a_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("a_judge", None)
    return "long=callable:a_judge:length"


@pytest.fixture
def received(tmp_path):
    """A comparison folder, next to a file and a folder that the commands must not touch."""
    (tmp_path / "victim.json").write_text('{"mine": true}')
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_text("mine\n")
    return comparison(tmp_path / "received", REWARDS).folder


@pytest.fixture(scope="module")
def seen():
    return Seen()


def run(command, *arguments):
    """The output of a command and its exit code."""
    result = CliRunner().invoke(mopo, [command, *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.output, result.exit_code


def tree(folder):
    """All entries below a folder: kinds, link targets and contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = stat.S_IFMT(path.lstat().st_mode)
        content = path.readlink() if path.is_symlink() else path.read_bytes() if stat.S_ISREG(kind) else None
        found[str(path.relative_to(folder))] = (kind, content)
    return found


def put(value, keys, case):
    """Change one place of a JSON value."""
    *outer, key = keys
    for each in outer:
        value = value[each]
    if case.get("remove"):
        del value[key]
    else:
        value[key] = case["value"]


def broken(folder, case, judge):
    """Apply a case of folders.yaml to a folder."""
    name = case.get("file", "comparison.json")
    if "SOURCE" in name:
        _, margin = parse_scorer(judge)
        source = digest([margin.model_dump(mode="json"), margin.content_digest()])
        name = _partial_file("a", "long", source, Comparison(folder).responses("a"))
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    if "link" in case or "pipe" in case or "folder" in case:
        path.unlink(missing_ok=True)
    if "link" in case:
        path.symlink_to(folder.parent / case["link"])
    elif "pipe" in case:
        os.mkfifo(path)
    elif "folder" in case:
        path.mkdir()
    elif "line" in case:
        lines = path.read_bytes().split(b"\n")
        line = case["line"]
        if "text" in case:
            text = case["text"]
            lines[line] = lines[line].decode().encode("utf-16") if text == "!UTF-16" else text.encode()
        else:
            value = json.loads(lines[line])
            put(value, case["at"], case)
            lines[line] = json.dumps(value).encode()
        path.write_bytes(b"\n".join(lines))
    elif "text" in case:
        path.write_text(case["text"])
    else:
        value = json.loads(path.read_text())
        put(value, case["at"], case)
        path.write_text(json.dumps(value))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_broken_folder_is_refused_and_left_as_it_is(name, received, judge):
    case = FOLDERS[name]
    broken(received, case, judge)
    before = tree(received.parent)
    command = case.get("run", "front")
    output, code = run(command, received, *(["--scorer", judge] if command == "score" else []))
    assert code == 1
    for text in case["expect"]:
        assert text in " ".join(output.split())
    changed = {path for path, what in tree(received.parent).items() if before.get(path) != what}
    assert {path for path in changed if path.partition("/")[0] != "__pycache__"} <= {"received/.lock"}
    assert not set(before) - set(tree(received.parent))


def test_there_are_enough_broken_folders_and_each_says_what_is_expected():
    assert len(FOLDERS) >= 40
    assert all(case["expect"] for case in FOLDERS.values())


def test_commands_touch_nothing_but_the_folder_that_they_are_given(received, judge, seen):
    """Scores and compares twice, so that there are files to replace and to remove."""
    outside = {path: what for path, what in tree(received.parent).items() if not path.startswith("received")}
    times = {path: (received.parent / path).stat().st_mtime_ns for path in outside}
    (received / "notes.txt").write_text("mine")
    (received / "responses" / ".partial" / "a" / "mine").mkdir(parents=True)
    with seen:
        for scorer in (judge, "short=length:words"):
            assert run("score", received, "--scorer", scorer)[1] == 0
        for _ in range(2):
            assert run("front", received)[1] == 0
        assert run("score", received, "--scorer", "short=length", "--replace")[1] == 0
    caches = (
        str(received),
        matplotlib.get_cachedir(),
        matplotlib.get_configdir(),
        tempfile.gettempdir() + "/matplotlib",
    )
    strays = {path for path in seen.written if path.startswith("/") and not path.startswith((*caches, "/dev/"))}
    assert {path for path in strays if "__pycache__" not in path} == set()
    assert seen.called == []
    after = tree(received.parent)
    assert {path: after[path] for path in outside} == outside
    assert {path: (received.parent / path).stat().st_mtime_ns for path in outside} == times
    assert (received / "notes.txt").read_text() == "mine"
    assert (received / "responses" / ".partial" / "a" / "mine").is_dir()


def test_what_was_kept_of_a_score_is_removed_when_it_is_there(received, judge, monkeypatch):
    kept = []
    append = Folder.append

    def noted(self, name, lines):
        append(self, name, lines)
        kept.extend(path for path in received.rglob(".partial/**/*") if path.is_file())

    monkeypatch.setattr(Folder, "append", noted)
    assert run("score", received, "--scorer", judge)[1] == 0
    assert len(set(kept)) == 3
    assert not (received / "responses" / ".partial").exists()


def test_a_lock_with_a_second_name_keeps_its_content(received):
    (received / ".lock").unlink(missing_ok=True)
    os.link(received.parent / "victim.json", received / ".lock")
    assert run("front", received)[1] == 0
    assert (received.parent / "victim.json").read_text() == '{"mine": true}'


def test_numbers_that_a_stranger_put_into_the_lines_are_no_scores(received, judge):
    path = received / "responses" / "a.jsonl"
    rows = [{**json.loads(line), "long": 999} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("score", received, "--scorer", judge)[1] == 0
    assert [row["long"] for row in Comparison(received).responses("a")] == [len(row["response"]) for row in rows]


def test_a_scorer_that_fails_leaves_the_scores_that_were_there(received, judge, tmp_path):
    assert run("score", received, "--scorer", judge)[1] == 0
    before = tree(received)
    (tmp_path / "a_broken_judge.py").write_text("def f(prompts, responses):\n    raise ValueError('no')\n")
    output, code = run("score", received, "--scorer", "long=callable:a_broken_judge:f", "--replace")
    assert code == 1
    assert "a_broken_judge:f, called with 4 responses" in " ".join(output.split())
    assert tree(received) == before


def test_numbers_that_were_kept_of_other_responses_are_not_used(received, judge):
    """As after a killed run whose responses were generated again."""
    rows = Comparison(received).responses("a")
    with Comparison.opened(received) as opened:
        opened.compute("a", "long", "source", 2, lambda part: [7.0] * len(part), "title")
        opened.replace("a", [{**row, "token_ids": [5]} for row in rows])
        assert opened.compute("a", "long", "source", 2, lambda part: [8.0] * len(part), "title") == [8.0] * 4


def test_more_objectives_than_can_be_compared_are_named(tmp_path):
    many = {f"goal{number}": HELPFUL for number in range(33)}
    folder = comparison(tmp_path / "many", {"a": [[[1.0] * 33]], "b": [[[2.0] * 33]]}, many, samples=1).folder
    output, code = run("front", folder)
    assert code == 1
    assert "there are 33 objectives; compare 31 of them at most" in " ".join(output.split())


def test_a_volume_too_large_for_a_number_is_named(tmp_path):
    many = {f"goal{number}": HELPFUL for number in range(11)}
    folder = comparison(tmp_path / "many", {"a": [[[1e30] * 11]], "b": [[[-1e30] * 11]]}, many, samples=1).folder
    output, code = run("front", folder)
    assert code == 1
    assert "the hypervolume of 11 objectives is too large for a float" in " ".join(output.split())


def test_a_user_s_own_files_beside_the_outputs_stay(received):
    for name in ("front.csv.part", "front.html~", ".part"):
        (received / name).write_text("mine")
    assert run("front", received)[1] == 0
    assert {(received / name).read_text() for name in ("front.csv.part", "front.html~", ".part")} == {"mine"}


@pytest.mark.parametrize("value", ["nan", "inf", "1e-40", "-1"])
def test_options_that_are_no_numbers_to_draw_with_are_refused(tmp_path, value):
    arguments = ("generate", tmp_path, "--prompts", "x", "--out", tmp_path / "out", "--temperature", value)
    output, code = run(*arguments)
    assert code == 2
    assert "emperature" in output
    assert "pydantic" not in output


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "a/.."])
def test_no_file_outside_of_a_folder_is_named(tmp_path, name):
    folder = Folder(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    for act in (lambda: folder.write(name, b"x"), lambda: folder.append(name, b"x"), lambda: folder.read(name, 9)):
        with pytest.raises(OSError, match="is not a path below"):
            act()
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_lines_are_not_added_to_a_file_that_has_a_second_name(tmp_path):
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "folder").mkdir()
    os.link(tmp_path / "victim", tmp_path / "folder" / "a.jsonl")
    with pytest.raises(OSError, match="has a second hard link"):
        Folder(tmp_path / "folder").append("a.jsonl", b"x\n")
    Folder(tmp_path / "folder").write("a.jsonl", b"x\n")  # replaces the link, does not write through it
    assert (tmp_path / "victim").read_text() == "mine\n"


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "a").write_bytes(b"0" * 100)
    with pytest.raises(OSError, match="100 bytes; the limit is 99"):
        Folder(tmp_path).read("a", 99)
    assert len(Folder(tmp_path).read("a", 100)) == 100


def test_two_commands_do_not_work_in_one_folder(received):
    with Comparison.opened(received):
        output, code = run("front", received)
    assert code == 1
    assert "another axolotl mopo command works in" in output


def test_settings_are_read_when_the_folder_is_locked(received, judge, monkeypatch):
    """Changes of another command between the start of this one and its lock are kept."""
    locked = Folder.locked

    def slow(self, name):
        made = json.loads((received / "comparison.json").read_text())
        made["objectives"]["speed"] = HELPFUL
        (received / "comparison.json").write_text(json.dumps(made))
        return locked(self, name)

    monkeypatch.setattr(Folder, "locked", slow)
    run("score", received, "--scorer", judge)
    assert set(Comparison(received).objectives) == {"helpful", "cost", "speed", "long"}


def test_nothing_is_scored_where_there_are_no_responses(tmp_path, judge):
    made = comparison(tmp_path / "empty", REWARDS)
    for name in REWARDS:
        (made.folder / "responses" / f"{name}.jsonl").write_text("")
    for command in (("score", made.folder, "--scorer", judge), ("front", made.folder)):
        output, code = run(*command)
        assert code == 1
        assert "holds no responses; generate them with axolotl mopo generate" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objectives", "helpful,helpful"], "every name once"),
        (["--objectives", "helpful,,cost"], "every name once"),
        (["--objectives", "speed"], "speed was not scored; scored: helpful, cost"),
        (["--reference-point", "speed=1"], "speed is not one of the compared objectives: helpful, cost"),
        (
            ["--objectives", "cost", "--reference-point", "helpful=1"],
            "helpful is not one of the compared objectives: cost",
        ),
        (["--reference-point", "helpful=nan"], "--reference-point helpful: it is nan; it must be a finite number"),
        (["--reference-point", "helpful=1e308"], "at most 1e+30 in magnitude"),
        (["--reference-point", "helpful=1,helpful=2"], "an objective is named twice"),
        (["--reference-point", "helpful"], "write a=0,b=-5"),
    ],
)
def test_what_cannot_be_compared_is_refused(received, arguments, words):
    output, code = run("front", received, *arguments)
    assert code != 0
    assert words in " ".join(output.split())


def test_blanks_between_names_do_not_count(received):
    output, code = run("front", received, "--objectives", "helpful, cost", "--reference-point", "helpful=0, cost=3")
    assert code == 0
    assert "Hypervolume above (helpful 0, cost 3)" in output


@pytest.mark.parametrize("name", ["kl", "tokens", "policy", "finished", "helpful_low", "helpful_win_rate", "logp"])
def test_an_objective_does_not_take_the_column_of_another(received, name):
    output, code = run("score", received, "--scorer", f"{name}=length")
    assert code == 1
    assert f"needs the column {name}, which is taken" in " ".join(output.split())


def test_an_objective_is_not_named_before_its_intervals(received, judge):
    assert run("score", received, "--scorer", "x_low=length")[1] == 0
    output, code = run("score", received, "--scorer", "x=length:words")
    assert code == 1
    assert "the objective x_low needs the column x_low, which is taken" in " ".join(output.split())


def test_a_scorer_whose_number_is_too_large_is_told_with_the_response(received, tmp_path, monkeypatch):
    (tmp_path / "a_huge_judge.py").write_text("def f(prompts, responses):\n    return [1e200] * len(responses)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = tree(received)
    output, code = run("score", received, "--scorer", "huge=callable:a_huge_judge:f")
    assert code == 1
    assert tree(received) == {**before, ".lock": tree(received)[".lock"]}
    assert "a, huge: the number of prompt 0, sample 1: it is 1e+200" in " ".join(output.split())


def test_a_direction_is_agreed_once(received, judge):
    assert run("score", received, "--scorer", judge, "--lower-is-better", "long")[1] == 0
    assert run("score", received, "--scorer", judge)[1] == 0
    assert Comparison(received).objectives["long"].lower_is_better
    output, code = run("score", received, "--scorer", judge, "--higher-is-better", "long")
    assert code == 1
    assert "long was scored with lower is better" in " ".join(output.split())
    assert Comparison(received).objectives["long"].lower_is_better
    assert run("score", received, "--scorer", judge, "--higher-is-better", "long", "--replace")[1] == 0
    assert not Comparison(received).objectives["long"].lower_is_better


def test_a_length_is_not_turned_around(received):
    for arguments in (("cost2=length:words", "--lower-is-better", "cost2"), ("cost=length:words", "--replace")):
        output, code = run("score", received, "--scorer", *arguments)
        assert code == 1
        assert "its scorer returns minus the length" in " ".join(output.split())
    assert "cost2" not in Comparison(received).objectives


def test_a_weighting_that_looks_like_code_stays_text(received, judge):
    made = json.loads((received / "comparison.json").read_text())
    weights = {"=cmd()": 0.5, "[red]$\\frac$": 0.25, "\x1b[31m": 0.25}
    made["policies"]["a"]["manifest"] = {"method": "modpo", "weights": weights}
    made["policies"]["b"]["manifest"] = {"method": "modpo", "weights": {"-1+1": 1}}
    (received / "comparison.json").write_text(json.dumps(made))
    assert run("score", received, "--scorer", judge)[1] == 0
    for objectives in ("helpful,cost,long", "helpful,cost"):
        output, code = run("front", received, "--objectives", objectives)
        assert code == 0, output
        assert "\x1b[31m" not in output
    table = (received / "front.csv").read_text()
    assert "'=cmd() 0.5" in table
    assert "'-1+1 1" in table
    assert "\x1b" not in table


def test_a_folder_of_an_older_version_is_read(received):
    """It lacks later settings, and has an empty mapping for a model without `mopo.json`."""
    made = json.loads((received / "comparison.json").read_text())
    del made["sampling"]["generation_config"]
    made["policies"]["reference"]["manifest"] = {}
    (received / "comparison.json").write_text(json.dumps(made))
    assert run("front", received)[1] == 0


def test_directions_of_objectives_are_in_the_settings(received):
    assert Comparison(received).objectives["cost"].lower_is_better is COST["lower_is_better"]
    with pytest.raises(ConfigError, match="the name 'a b' is not allowed"):
        Comparison(received).add_objective("a b", Comparison(received).objectives["cost"])

"""Forks of the warm process are what fresh processes would be, and none outlives a failure."""

import os
import signal
import subprocess
import sys
import time

import pytest
from warm import ROOT, Process, python, ranks

TELL = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("TOLD"), __name__, sys.stdin.read()]))
print("an error", file=sys.stderr)
{end}
"""


@pytest.mark.parametrize(
    "end", ["", "sys.exit(3)", "sys.exit('bad')", "1 / 0", "os.kill(os.getpid(), 9)", "os._exit(4)"]
)
@pytest.mark.parametrize("kind", ["script", "code"])
def test_a_fork_is_told_what_a_fresh_interpreter_is_and_ends_alike(tmp_path, monkeypatch, kind, end):
    monkeypatch.setenv("TOLD", "something")
    script = tmp_path / "script.py"
    script.write_text(TELL.format(end=end))
    arguments = [str(script), "a", "b"] if kind == "script" else ["-c", script.read_text(), "a", "b"]
    cold = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    warm = python(*arguments, cwd=tmp_path)
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.stderr.splitlines()[:1] == cold.stderr.splitlines()[:1] == ["an error"]
    assert warm.stderr.splitlines()[-1] == cold.stderr.splitlines()[-1]


def test_modules_beside_the_script_and_on_the_path_are_found(tmp_path, monkeypatch):
    for name in ("beside", "path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"on_{name}.py").write_text("")
    (tmp_path / "beside" / "script.py").write_text("import on_beside, on_path, killing")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), str(ROOT / "tests")]))
    assert python(tmp_path / "beside" / "script.py").returncode == 0
    monkeypatch.delenv("PYTHONPATH")
    assert "No module named 'on_path'" in python(tmp_path / "beside" / "script.py").stderr
    assert "No module named 'killing'" in python("-c", "import killing").stderr


def test_a_variable_that_was_read_at_import_cannot_be_changed():
    assert "imported what reads DS_ACCELERATOR" in python("-c", "", env={"DS_ACCELERATOR": "cuda"}).stderr


def test_a_command_can_be_killed_and_takes_its_children_along():
    process = Process("-c", "import os, time; os.fork(); time.sleep(600)")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    assert process.poll() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("a child lives on")


RANK = """
import os, sys, time
import torch
from torch.distributed import all_gather_object, destroy_process_group, init_process_group
init_process_group("gloo")
rank = int(os.environ["RANK"])
both = [None, None]
all_gather_object(both, [rank, os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], os.environ["GIVEN"], sys.argv[1:]])
print(both, flush=True)
{end}
destroy_process_group()
"""


@pytest.fixture
def rank_script(tmp_path):
    def write(end=""):
        (tmp_path / "rank.py").write_text(RANK.format(end=end))
        return tmp_path / "rank.py"

    return write


def test_ranks_talk(rank_script):
    said = ranks(rank_script(), "one", 2, env={"GIVEN": "x"})
    expected = [[rank, str(rank), "2", "x", ["one", "2"]] for rank in (0, 1)]
    assert all(output.endswith(f"{expected}\n") for output in said)


def test_one_rank_that_fails_ends_all_and_both_outputs_are_shown(rank_script):
    script = rank_script("print('I am', rank, flush=True)\nif rank: sys.exit('no more')\ntime.sleep(600)")
    with pytest.raises(AssertionError) as caught:
        ranks(script, env={"GIVEN": ""})
    assert "rank 1 ended with 1" in str(caught.value)
    for words in ("I am 0", "I am 1", "no more"):
        assert words in str(caught.value)


def test_ranks_that_hang_are_ended(rank_script):
    with pytest.raises(AssertionError, match="2 of 2 processes still ran after 5 seconds"):
        ranks(rank_script("time.sleep(600)"), env={"GIVEN": ""}, timeout=5)

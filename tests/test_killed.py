"""`axolotl mopo generate` and `score`, killed at several points: a second run leaves the same files."""

import os
import signal
import time

import pytest
from conftest import SMOKE, axolotl, build_model
from test_generation import save_run
from transformers import AutoConfig, AutoTokenizer
from warm import AXOLOTL, Process

JUDGE = """
import time
def slow(prompts, responses):
    time.sleep(0.2)
    return [float(len(response)) for response in responses]
"""


def kill_when(condition, *arguments):
    """Run a command and kill it as soon as the condition is true."""
    process = Process(AXOLOTL, *arguments)
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "responses").glob("*.jsonl")} | {
        "settings": (folder / "comparison.json").read_bytes()
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of an adapter, next to a module with a slow scorer."""
    base = tmp_path / "base"
    build_model(AutoConfig.from_pretrained(SMOKE / "model")).save_pretrained(base)
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(base)
    (tmp_path / "my_judge.py").write_text(JUDGE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return save_run(base, tmp_path / "run", 1)


def test_killed_commands_go_on_and_leave_the_same_files(run, tmp_path):
    prompts = SMOKE / "pairs.jsonl"
    common = ("--prompts", prompts, "--limit", 40, "--max-new-tokens", 24, "--batch-size", 1)
    scorer = ("--scorer", "nice={source: callable, function: 'my_judge:slow', batch_size: 4}")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    axolotl("mopo", "generate", run, *common, "--out", undisturbed)
    axolotl("mopo", "score", undisturbed, *scorer)

    generate = ("mopo", "generate", run, *common, "--out", killed)
    responses = killed / "responses"
    kill_when(lambda: lines(responses / "run.jsonl") >= 7, *generate)
    kill_when(lambda: lines(responses / "reference.jsonl") >= 1, *generate)
    kill_when(lambda: any(lines(part) >= 3 for part in responses.glob(".partial/run/logp/*")), *generate)
    axolotl(*generate)
    for least in (1, 5):
        kill_when(
            lambda least=least: any(lines(part) >= 4 * least for part in responses.glob(".partial/*/nice/*")),
            "mopo",
            "score",
            killed,
            *scorer,
        )
    axolotl("mopo", "score", killed, *scorer)
    assert files(killed) == files(undisturbed)
    assert not list(responses.glob(".partial/*/*/*"))

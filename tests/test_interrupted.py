"""Training runs that are killed at random moments and resumed end, to the bit, where undisturbed ones do."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import yaml
from conftest import LORA_WITH_DROPOUT, ROOT, SMOKE, build_model, smoke_config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from warm import AXOLOTL, python

RUNS = 20
STEPS = 8
EVENTS = {"on_step_begin": 1, "on_substep_end": 1, "on_pre_optimizer_step": 1, "on_step_end": 1, "on_save": 0.5}
"""Events at which a run is killed, and how often each occurs in a step."""
KINDS = [("amopo", {}), ("amopo", LORA_WITH_DROPOUT), ("modpo", {}), ("modpo", LORA_WITH_DROPOUT)]
GAUSSIAN = {"dimensions": ["helpfulness", "correctness"], "temperature": 0.1}
"""The weights are drawn in every step."""


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    """The configuration of a run of one of the kinds, by its name."""
    folder = tmp_path_factory.mktemp("interrupted")
    build_model(AutoConfig.from_pretrained(SMOKE / "model")).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(SMOKE / "model").save_pretrained(folder / "model")

    def configuration(kind, name):
        method, adapter = KINDS[kind]
        return smoke_config(
            method,
            folder / name,
            base_model=str(folder / "model"),
            reinit_weights=None,
            plugins=["axolotl_mopo.MOPOPlugin", "killing.KillingPlugin"],
            max_steps=STEPS,
            micro_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            auto_resume_from_checkpoints=True,
            dataset_prepared_path=str(folder / "prepared"),
            dataloader_num_workers=0,  # those of a killed process live on for a while
            eval_strategy="no",
            test_datasets=None,
            seed=kind,
            **({"amopo": GAUSSIAN} if method == "amopo" else {}),
            **adapter,
        )

    return configuration


@pytest.fixture(scope="module")
def ended(configuration, tmp_path_factory):
    """How the processes ended: an undisturbed one of each kind, then every killed run and what went on with it."""
    draw = random.Random(0)
    jobs = [{"cfg": configuration(kind, f"undisturbed{kind}")} for kind in range(len(KINDS))]
    for run in range(RUNS):
        event = draw.choice(list(EVENTS))
        moment = [event, draw.randint(1, int(STEPS * EVENTS[event])), "SIGKILL"]
        cfg = configuration(run % len(KINDS), f"run{run}")
        jobs += [{"cfg": cfg, "kill_at": moment}, {"cfg": cfg}]
    jobs.append({"cfg": configuration(0, "interrupted"), "kill_at": ["on_step_end", 3, "SIGINT"]})
    folder = tmp_path_factory.mktemp("jobs")
    return [train(folder / str(number), **job) for number, job in enumerate(jobs)]


def train(folder, cfg, kill_at=None):
    """How the train command ends that is killed at an event, the nth time, by a signal."""
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(cfg))
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    if kill_at is not None:
        env["KILL_AT"] = json.dumps(kill_at)
    return python(AXOLOTL, "train", config, "--launcher", "python", env=env).returncode


def weights(cfg):
    (path,) = Path(cfg["output_dir"]).glob("*.safetensors")
    return load_file(path)


@pytest.mark.xdist_group("interrupted")
@pytest.mark.parametrize("run", range(RUNS))
def test_a_killed_run_ends_where_an_undisturbed_one_does(configuration, ended, run):
    killed, resumed = ended[len(KINDS) + 2 * run :][:2]
    assert killed == -signal.SIGKILL
    assert resumed == 0
    kind = run % len(KINDS)
    assert ended[kind] == 0
    undisturbed, own = (weights(configuration(kind, name)) for name in (f"undisturbed{kind}", f"run{run}"))
    assert undisturbed.keys() == own.keys()
    assert all((undisturbed[name] == own[name]).all() for name in own)


@pytest.mark.xdist_group("interrupted")
def test_sigint_saves_as_the_host_does(configuration, ended):
    assert ended[-1] == 0
    cfg = configuration(0, "interrupted")
    saved = weights(cfg)
    undisturbed = weights(configuration(0, "undisturbed0"))
    assert saved.keys() == undisturbed.keys()
    assert any((saved[name] != undisturbed[name]).any() for name in saved)  # three steps, not eight

"""A resumed run whose weights are split looks its reference up, by the weights that it started from."""

import json
import shutil
from unittest import mock

import pytest
import torch
from conftest import host_trainer, smoke_config

from axolotl_mopo.errors import ConfigError
from axolotl_mopo.training.callbacks import START, read_start


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps with a checkpoint after two, and its trainer."""
    folder = tmp_path_factory.mktemp("start")
    cfg = smoke_config("modpo", folder, max_steps=3, save_strategy="steps", save_steps=2, eval_strategy="no")
    torch.manual_seed(0)
    trainer = host_trainer(cfg)
    trainer.train()
    return trainer, folder / "out" / "checkpoint-2", folder / "prepared" / "modpo-cache"


def resume(trainer, checkpoint):
    """What is done before the checkpoint's weights are loaded, as if the policy's weights were split."""
    with mock.patch.object(type(trainer), "is_sharded", True):
        return trainer._recorded_start(checkpoint)


def test_a_checkpoint_names_the_weights_of_the_start(run):
    trainer, checkpoint, _ = run
    assert read_start(checkpoint) == trainer.start
    assert set(trainer.start) == {"base", "initial", "dtype"}
    assert trainer.start["dtype"] == "float32"
    assert trainer._recorded_start(checkpoint) is None  # one process has the weights themselves


def test_tables_are_found_by_the_start_though_the_policy_has_moved(run):
    trainer, checkpoint, cache = run
    tables = {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    before = trainer._constants["train"]
    trainer.precompute(trainer.model, recorded=resume(trainer, checkpoint))
    for table, other in zip(before, trainer._constants["train"], strict=True):
        assert torch.equal(table, other)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")} == tables


def test_a_reference_that_cannot_be_found_is_not_computed_from_a_policy_that_has_moved(run, tmp_path):
    trainer, checkpoint, cache = run
    shutil.move(cache, tmp_path / "elsewhere")
    try:
        with pytest.raises(ConfigError, match=r"`modpo.cache_dir`: Reference, train of the resumed run is not"):
            trainer.precompute(trainer.model, recorded=resume(trainer, checkpoint))
        assert not list(cache.glob("*.safetensors"))
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.move(tmp_path / "elsewhere", cache)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "contains no modpo_start.json"),
        ("{", "is not JSON"),
        ("[]", "modpo_start.json: input should be"),
        (json.dumps({"base": "a", "initial": "b"}), "modpo_start.json, `dtype`: field required"),
        (
            json.dumps({"base": "a", "initial": 3, "dtype": "float32"}),
            "`initial`: input should be a valid string, not 3",
        ),
        (
            json.dumps({"base": "a", "initial": "b", "dtype": "load"}),
            "`dtype`: input should be 'float32', .*, not 'load'",
        ),
        (json.dumps(dict.fromkeys(("base", "initial", "more"), "a") | {"dtype": "float32"}), "`more`: extra inputs"),
    ],
)
def test_a_checkpoint_without_its_start_is_refused(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / START).write_text(content)
    with pytest.raises(ConfigError, match=f"`resume_from_checkpoint`: .*{message}"):
        resume(run[0], tmp_path)


def test_a_resume_without_any_checkpoint_is_transformers_own_error(run, tmp_path):
    trainer = run[0]
    with mock.patch.object(trainer.args, "output_dir", str(tmp_path)), pytest.raises(ValueError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_split_model_is_not_evaluated_by_itself(run):
    with (
        mock.patch.object(run[0], "_layout_tried", False),
        pytest.raises(ConfigError, match="evaluated only within a training run"),
    ):
        run[0].evaluate()

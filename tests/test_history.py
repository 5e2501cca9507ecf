"""The plot of a run, and what it shows of the Trainer's log."""

import pytest
from transformers import TrainerState, TrainingArguments

from axolotl_mopo.config import AMoPOConfig
from axolotl_mopo.training.callbacks import HistoryCallback, write_manifest
from axolotl_mopo.training.history import curves, draw

AMOPO = [
    {"loss": 2.1, "rewards/margins": 0.1, "rewards/margins/helpfulness": 0.2, "weights/helpfulness": 0.5, "step": 5},
    {"eval_loss": 2.0, "eval_rewards/accuracies/helpfulness": 0.6, "eval_weights/helpfulness": 0.5, "step": 5},
    {
        "loss": 1.9,
        "rewards/margins": 0.3,
        "rewards/margins/helpfulness": 0.4,
        "weights_std/helpfulness": 0.1,
        "step": 10,
    },
]
MODPO = [{"loss": 0.7, "margins/safer": 0.3, "margins/safer/chosen": 1.0, "rewards/collective_margins": 0.2, "step": 1}]


def test_every_objective_has_its_curve():
    panels = curves(AMOPO)
    assert panels["loss"] == {"loss": [(5, 2.1), (10, 1.9)], "eval_loss": [(5, 2.0)]}
    assert panels["reward margins"] == {
        "rewards/margins": [(5, 0.1), (10, 0.3)],
        "rewards/margins/helpfulness": [(5, 0.2), (10, 0.4)],
    }
    assert panels["accuracies"] == {"eval_rewards/accuracies/helpfulness": [(5, 0.6)]}
    assert set(panels["weights of the dimensions"]) == {"weights/helpfulness", "eval_weights/helpfulness"}
    assert curves(MODPO)["margin rewards, chosen - rejected"] == {"margins/safer": [(1, 0.3)]}


def test_a_run_without_a_log_has_no_picture():
    assert draw([{"train_runtime": 3.0, "step": 1}]) is None
    assert draw(AMOPO).startswith(b"\x89PNG")


def test_nothing_is_written_through_a_link_in_a_run_s_folder(tmp_path, host_log):
    (tmp_path / "mine").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("mopo.png", "mopo.json"):
        (run / name).symlink_to(tmp_path / "mine")
    HistoryCallback().on_train_end(TrainingArguments(output_dir=str(run)), TrainerState(log_history=AMOPO), None)
    assert "mopo.png in" in host_log.text
    with pytest.raises(OSError, match=r"mopo.json in .* is a symbolic link"):
        write_manifest(AMoPOConfig(dimensions=["helpfulness"]), "base", run)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_picture_that_cannot_be_drawn_stops_nothing(tmp_path, host_log):
    (tmp_path / "mopo.png").mkdir()
    state = TrainerState(log_history=AMOPO)
    HistoryCallback().on_train_end(TrainingArguments(output_dir=str(tmp_path)), state, None)
    assert "mopo.png could not be written" in host_log.text

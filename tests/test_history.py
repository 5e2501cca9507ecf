"""The picture of a run: what it shows of the host's log."""

from transformers import TrainerState, TrainingArguments

from axolotl_mopo.history import HistoryCallback, curves, draw

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


def test_a_run_without_a_log_has_no_picture(tmp_path):
    draw([{"train_runtime": 3.0, "step": 1}], tmp_path / "mopo.png")
    assert not (tmp_path / "mopo.png").exists()
    draw(AMOPO, tmp_path / "mopo.png")
    assert (tmp_path / "mopo.png").stat().st_size > 1000


def test_a_picture_that_cannot_be_drawn_stops_nothing(tmp_path, host_log):
    (tmp_path / "mopo.png").mkdir()
    state = TrainerState(log_history=AMOPO)
    HistoryCallback().on_train_end(TrainingArguments(output_dir=str(tmp_path)), state, None)
    assert "mopo.png could not be drawn" in host_log.text

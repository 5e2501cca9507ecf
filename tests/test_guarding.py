"""A loss that is no finite number: the run stops with the rows named, or the step is skipped and counted."""

import re
from pathlib import Path

import pytest
import torch
from conftest import Poison, host_trainer, rare_token, smoke_config
from transformers import TrainerCallback

from axolotl_mopo.errors import LossError

METHODS = ["amopo", "modpo"]
METHODS = {
    "amopo": {"dimensions": ["helpfulness"]},
    "modpo": {
        "objective": "overall",
        "weights": {"overall": 0.5, "brief": 0.5},
        "margins": {"brief": {"source": "length"}},
    },
}


@pytest.fixture
def config(tmp_path):
    """Twelve pairs in three steps: every one is seen."""

    def config(method, on_bad_loss="raise", **overrides):
        cfg = smoke_config(
            method,
            tmp_path,
            micro_batch_size=2,
            gradient_accumulation_steps=2,
            eval_strategy="no",
            test_datasets=None,
            **{method: {**METHODS[method], "on_bad_loss": on_bad_loss}},
            # The token's column of the head would be infinite as well.
            overrides_of_model_config={"tie_word_embeddings": False},
            **{"max_steps": 3, **overrides},
        )
        cfg["datasets"][0]["split"] = "train[:12]"
        return cfg

    return config


class States(TrainerCallback):
    """Keeps parameters and the optimizer's state before and after every step."""

    def __init__(self):
        self.before, self.after, self.poisoned = [], [], []

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before.append(snapshot(model, optimizer))

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.after.append(snapshot(model, optimizer))


def snapshot(model, optimizer):
    states = [value.clone() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return [*(parameter.detach().clone() for parameter in model.parameters()), *states]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_loss_stops_the_run_before_it_is_logged_or_saved(config, method):
    trainer = host_trainer(config(method, logging_steps=10, save_strategy="steps", save_steps=1))
    token, row = rare_token(trainer)
    trainer.add_callback(Poison(token))
    with pytest.raises(LossError) as refused:
        trainer.train()
    step, rows = re.search(
        r"loss of step (\d) is not finite, for row (.*) of the prepared", str(refused.value)
    ).groups()
    assert int(step) == trainer.state.global_step
    assert row in map(int, re.findall(r"(\d+) \(chosen", rows))
    assert repr(trainer.processing_class.decode(trainer.train_dataset[row]["chosen_input_ids"][:12])) in rows
    assert "set `on_bad_loss: skip`" in str(refused.value)
    saved = sorted(folder.name for folder in Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert saved == [f"checkpoint-{number}" for number in range(1, int(step))]


def test_a_bad_loss_stops_the_run_before_an_epoch_is_saved(config):
    trainer = host_trainer(config("amopo", logging_steps=10, save_strategy="epoch", max_steps=None, num_epochs=1))
    token, _ = rare_token(trainer)
    trainer.add_callback(Poison(token))
    with pytest.raises(LossError):
        trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert not [entry for entry in trainer.state.log_history if "train_loss" in entry]


class BadGradient(TrainerCallback):
    """Makes a gradient infinite in the second step, as an overflow in the backward pass would."""

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(model.parameters()).grad[0, 0] = torch.inf


def test_a_bad_gradient_is_skipped_too(config, host_log):
    trainer = host_trainer(config("amopo", on_bad_loss="skip"))
    states = States()
    trainer.add_callback(states)
    trainer.add_callback(BadGradient())
    trainer.train()
    assert [same(*pair) for pair in zip(states.before, states.after, strict=True)] == [False, True, False]
    assert (
        "The gradient of step 2 is not finite, though the loss is. The step is skipped; 1 were so far." in host_log.text
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_step_is_skipped_and_counted(config, method, host_log):
    trainer = host_trainer(config(method, on_bad_loss="skip", max_steps=6))
    token, row = rare_token(trainer)
    states = States()
    trainer.add_callback(states)
    trainer.add_callback(Poison(token))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "skipped_steps" in entry]
    skipped = [entry["skipped_steps"] for entry in logs]
    assert skipped[2] == 1  # the row is seen once an epoch
    assert skipped[5] == 2
    for number, (before, after) in enumerate(zip(states.before, states.after, strict=True)):
        bad = skipped[number] > (skipped[number - 1] if number else 0)
        assert same(before, after) is bad
        for key in ("loss", "grad_norm", "rewards/margins"):
            assert (key in logs[number]) is not bad
    assert f"row {row} (chosen" in host_log.text or f"; {row} (chosen" in host_log.text
    assert "The step is skipped; 2 were so far." in host_log.text
    assert all(torch.tensor(value).isfinite() for entry in logs for value in entry.values())

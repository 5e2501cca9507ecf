"""A loss that is no finite number: the run stops with the rows named, or the step is skipped and counted."""

import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import Poison, host_trainer, rare_token, smoke_config
from transformers import TrainerCallback, TrainerControl, TrainerState

from axolotl_mopo.errors import LossError
from axolotl_mopo.training.loss_guard import LossGuard, describe_rows
from axolotl_mopo.training.metrics import MetricWindow

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
        "The gradient of step 2 is not finite, though the loss is. The step is skipped (1 skipped so far)."
        in host_log.text
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
    assert "The step is skipped (2 skipped so far)." in host_log.text
    assert all(torch.tensor(value).isfinite() for entry in logs for value in entry.values())


def test_a_micro_batch_of_a_skipped_step_leaves_the_hosts_mean_finite(config):
    trainer = host_trainer(config("amopo", on_bad_loss="skip"))
    token, row = rare_token(trainer)
    Poison(token).on_train_begin(None, None, None, trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    good, bad = (
        trainer.training_step(trainer.model, trainer.data_collator([trainer.train_dataset[number] for number in rows]))
        for rows in ([(row + 2) % 12, (row + 1) % 12], [(row + 1) % 12, row])
    )
    assert good > 0
    assert bad == 0
    assert trainer.loss_guard.first_bad_step()


ROWS = [{"chosen_input_ids": [row, 7], "rejected_input_ids": [row, 8]} for row in range(20)]


@pytest.fixture
def guard():
    """The guard of a run that stops."""
    decoder = SimpleNamespace(decode=lambda tokens: " ".join(map(str, tokens)))
    return LossGuard(Accelerator(cpu=True), MetricWindow(), partial(describe_rows, ROWS, decoder), skip=False)


def note(guard, step, losses):
    """Note losses by their rows."""
    guard.note(step, torch.tensor(list(losses)), torch.tensor(list(losses.values())))


def test_the_first_bad_step_is_named_with_its_own_rows(guard):
    note(guard, 3, {1: 0.5, 4: 2.0})
    note(guard, 4, {9: math.inf, 2: 1.0})
    note(guard, 4, {11: 0.5, 5: math.nan})
    note(guard, 5, {12: -math.inf, 13: math.nan})
    assert guard.first_bad_step() == (4, [5, 9])
    assert guard.first_bad_step() is None
    note(guard, 6, {3: 0.5})
    assert guard.first_bad_step() is None


@pytest.mark.parametrize(
    ("moment", "flag"),
    [
        ("on_step_end", "should_log"),
        ("on_step_end", "should_save"),
        ("on_step_end", "should_evaluate"),
        ("on_step_end", "should_training_stop"),
        ("on_epoch_end", None),
    ],
)
def test_a_run_stops_before_whatever_reads_or_keeps_the_state(guard, moment, flag):
    state, control = TrainerState(), TrainerControl()
    note(guard, 2, {6: math.nan, 7: 1.0})
    guard.on_step_end(None, state, control)  # the Trainer continues with the next step
    if flag:
        setattr(control, flag, True)
    with pytest.raises(LossError, match="The loss of step 2 is not finite, for row 6 "):
        getattr(guard, moment)(None, state, control)


@pytest.mark.parametrize(
    ("bad", "named", "rest"), [(1, 1, ""), (3, 3, ""), (4, 3, "; and 1 more"), (9, 3, "; and 6 more")]
)
def test_three_rows_of_a_bad_step_are_shown_and_the_others_counted(guard, bad, named, rest):
    note(guard, 1, dict.fromkeys(reversed(range(10, 10 + bad)), math.nan))
    with pytest.raises(LossError) as refused:
        guard.on_epoch_end(None, TrainerState(), TrainerControl())
    shown = "; ".join(f"{row} (chosen '{row} 7', rejected '{row} 8')" for row in range(10, 10 + named))
    assert f"for row {shown}{rest} of the prepared training set" in str(refused.value)

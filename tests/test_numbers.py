"""Numbers at the edge: impossible and certain tokens, very long prompts, identical responses, in half precision."""

import itertools

import pytest
import torch
from conftest import Poison, host_trainer, smoke_config
from datasets import Dataset

from axolotl_mopo.errors import DataError
from axolotl_mopo.losses import adaptive_weights, amopo_loss, modpo_loss
from axolotl_mopo.training.prepared_rows import with_lengths

LOGPS = (0.0, -1e-7, -0.7, -5000.0)
LENGTHS = (1, 8000)
DTYPES = [torch.float32, torch.bfloat16]


def combinations(dtype, *values):
    """A column for each argument, over all combinations."""
    return [torch.tensor(column).to(dtype) for column in zip(*itertools.product(*values), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@pytest.mark.parametrize(("beta", "weight"), [(0.1, 0.5), (0.5, 0.05), (5.0, 0.01)])
def test_modpos_loss_and_its_gradients_are_finite(dtype, loss_type, beta, weight):
    chosen, rejected, ref_chosen, ref_rejected, margin = combinations(dtype, *[LOGPS] * 4, (0.0, -8000.0, 1e6))
    chosen.requires_grad_(), rejected.requires_grad_()
    losses, *rewards = modpo_loss(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        margin[:, None],
        torch.zeros_like(margin)[:, None],
        beta=beta,
        objective_weight=weight,
        margin_weights=torch.tensor([1 - weight], dtype=dtype),
        loss_type=loss_type,
    )
    losses.mean().backward()
    assert all(values.isfinite().all() for values in (losses, *rewards, chosen.grad, rejected.grad))
    assert losses.min() >= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
@pytest.mark.parametrize(("beta", "gamma"), [(0.8, 2.0), (20.0, 0.0)])
def test_amopos_loss_and_its_gradients_are_finite(dtype, loss_type, beta, gamma):
    columns = combinations(dtype, LOGPS, LOGPS, LENGTHS, LENGTHS)
    chosen, rejected, chosen_lengths, rejected_lengths = (column[:, None] for column in columns)
    chosen.requires_grad_(), rejected.requires_grad_()
    losses, each = amopo_loss(
        chosen,
        rejected,
        chosen_lengths,
        rejected_lengths,
        torch.ones_like(chosen),
        beta=beta,
        gamma=gamma,
        loss_type=loss_type,
    )
    losses.mean().backward()
    assert all(values.isfinite().all() for values in (losses, each, chosen.grad, rejected.grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["gaussian", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e3])
def test_amopos_weights_of_impossible_and_certain_tokens(dtype, scheme, temperature):
    """Mean probabilities of 0 and 1, with no spread and with the widest that there is."""
    means, stds = combinations(dtype, (0.0, 1.0), (0.0, 0.5))
    chosen, rejected = (means.expand(4, 4), stds.expand(4, 4)), (means.expand(4, 4).T, stds.expand(4, 4).T)
    weights = adaptive_weights(*chosen, *rejected, scheme=scheme, temperature=temperature)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert torch.allclose(weights.float().sum(-1), torch.ones(4), atol=0.02)


def pair(prompt, chosen, rejected, prompts):
    return {
        "prompt_input_ids": [list(range(5, 5 + number)) + prompt for number in range(prompts)],
        "chosen_input_ids": chosen,
        "rejected_input_ids": rejected,
        "chosen_margin_rewards": [-1.0],
        "rejected_margin_rewards": [-40.0],
    }


def pairs(prompts):
    """One-token completions, identical ones, a prompt of 8,000 tokens, a very long completion."""
    long = torch.arange(8000).remainder(500).add(20).tolist()
    return [
        pair([7, 8, 9], [11], [12], prompts),
        pair([7, 8, 9, 10], [30, 31, 2], [30, 31, 2], prompts),
        pair(long, [11], [30, 31, 2], prompts),
        pair([7], long[:2000], [12], prompts),
    ]


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize(
    "block",
    [
        {"amopo": {"dimensions": ["helpfulness"], "sft_coef": 1.0}},
        {"amopo": {"dimensions": ["helpfulness"], "loss_type": "orpo", "weighting": "mean", "temperature": 0.01}},
        {
            "modpo": {
                "objective": "overall",
                "weights": {"overall": 0.1, "b": 0.9},
                "margins": {"b": {"source": "length"}},
            }
        },
    ],
    ids=["simpo", "orpo", "modpo"],
)
def test_a_step_of_extreme_pairs_has_finite_gradients(tmp_path, block, scale):
    """With a head scaled up, tokens get probabilities of exactly 0 and 1, and responses log-probs below -5,000."""
    (method,) = block
    trainer = host_trainer(smoke_config(method, tmp_path, eval_strategy="no", test_datasets=None, **block))
    trainer.model.to(torch.bfloat16)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(scale)
    rows = with_lengths(Dataset.from_list(pairs(2 if method == "amopo" else 1)))
    trainer.train_dataset = rows.add_column("pair_index", list(range(len(rows))))
    if method == "modpo":
        trainer.precompute(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(rows))])
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, batch)
    metrics = trainer.train_window.pop(trainer.accelerator)
    assert loss.isfinite()
    assert all(torch.tensor(value).isfinite() for statistic in metrics.values() for value in statistic)
    assert all(p.grad.isfinite().all() for p in trainer.model.parameters() if p.grad is not None)
    assert any(p.grad.abs().sum() > 0 for p in trainer.model.parameters() if p.grad is not None)
    if scale > 1:
        assert metrics["logps/chosen"].mean < -5000


def test_a_reference_that_is_not_finite_is_named(tmp_path):
    trainer = host_trainer(smoke_config("modpo", tmp_path))
    Poison(trainer.train_dataset[5]["chosen_input_ids"][0]).on_train_begin(None, None, None, trainer.model)
    with pytest.raises(DataError, match=r"Reference, train: row \d+ of the prepared rows gets \[nan, nan\]"):
        trainer.precompute(trainer.model)


def test_a_margin_that_float32_cannot_hold_is_named(tmp_path):
    cfg = smoke_config("modpo", tmp_path)
    name, margin = next(iter(cfg["modpo"]["margins"].items()))
    cfg["modpo"]["margins"][name] = {**margin, "scale": 1e300}
    trainer = host_trainer(cfg)
    with pytest.raises(DataError, match=rf"`modpo.margins.{name}`: the reward .*e\+300 of row 0 .* set `clip`"):
        trainer.precompute(trainer.model)

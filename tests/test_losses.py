"""The losses equal an independent plain-Python reference in float64, and the published losses that they contain."""

import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_mopo.losses import adaptive_weights, amopo_loss, modpo_loss

EXACT = {"rel_tol": 1e-10, "abs_tol": 1e-10}

logps = st.floats(-400, -1e-3)
rewards = st.floats(-20, 20)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def log_odds(logp):
    return logp - math.log(-math.expm1(logp))


@st.composite
def modpo_batches(draw):
    pairs, margins = draw(st.integers(1, 4)), draw(st.integers(0, 3))

    def column():
        return draw(st.lists(logps, min_size=pairs, max_size=pairs))

    def table():
        row = st.lists(rewards, min_size=margins, max_size=margins)
        return draw(st.lists(row, min_size=pairs, max_size=pairs))

    return {
        "logps": [column() for _ in range(4)],
        "margins": [table(), table()],
        "beta": draw(st.floats(0.01, 2)),
        "objective_weight": draw(st.floats(0.05, 2)),
        "margin_weights": draw(st.lists(st.floats(-2, 2), min_size=margins, max_size=margins)),
    }


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@given(batch=modpo_batches())
@settings(max_examples=100, deadline=None)
def test_modpo_equals_plain_python(loss_type, batch):
    pairs, margins = len(batch["logps"][0]), len(batch["margin_weights"])
    losses, chosen_rewards, rejected_rewards = modpo_loss(
        *map(tensor, batch["logps"]),
        *(tensor(table).view(pairs, margins) for table in batch["margins"]),
        beta=batch["beta"],
        objective_weight=batch["objective_weight"],
        margin_weights=tensor(batch["margin_weights"]),
        loss_type=loss_type,
    )

    def reward(logp, ref_logp, margin_rewards):
        penalty = sum(w * r for w, r in zip(batch["margin_weights"], margin_rewards, strict=True))
        return (batch["beta"] * (logp - ref_logp) - penalty) / batch["objective_weight"]

    for pair in range(pairs):
        chosen, rejected, ref_chosen, ref_rejected = (column[pair] for column in batch["logps"])
        s_chosen = reward(chosen, ref_chosen, batch["margins"][0][pair])
        s_rejected = reward(rejected, ref_rejected, batch["margins"][1][pair])
        gap = s_chosen - s_rejected
        expected = -log_sigmoid(gap) if loss_type == "sigmoid" else max(0.0, 1 - gap)
        assert math.isclose(losses[pair].item(), expected, **EXACT)
        assert math.isclose(chosen_rewards[pair].item(), s_chosen, **EXACT)
        assert math.isclose(rejected_rewards[pair].item(), s_rejected, **EXACT)


@st.composite
def amopo_batches(draw):
    pairs, dimensions = draw(st.integers(1, 3)), draw(st.integers(1, 5))

    def table(elements):
        row = st.lists(elements, min_size=dimensions, max_size=dimensions)
        return draw(st.lists(row, min_size=pairs, max_size=pairs))

    raw = table(st.floats(0.01, 1))
    return {
        "logps": [table(logps), table(logps)],
        "lengths": [table(st.integers(1, 300)), table(st.integers(1, 300))],
        "weights": [[w / sum(row) for w in row] for row in raw],
        "beta": draw(st.floats(0.05, 5)),
        "gamma": draw(st.floats(0, 4)),
    }


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
@given(batch=amopo_batches())
@settings(max_examples=100, deadline=None)
def test_amopo_equals_plain_python(loss_type, batch):
    losses, per_dimension = amopo_loss(
        *map(tensor, batch["logps"]),
        *map(tensor, batch["lengths"]),
        tensor(batch["weights"]),
        beta=batch["beta"],
        gamma=batch["gamma"],
        loss_type=loss_type,
    )
    for pair, weights in enumerate(batch["weights"]):
        total = 0.0
        for d, weight in enumerate(weights):
            chosen = batch["logps"][0][pair][d] / batch["lengths"][0][pair][d]
            rejected = batch["logps"][1][pair][d] / batch["lengths"][1][pair][d]
            if loss_type == "simpo":
                expected = -log_sigmoid(batch["beta"] * (chosen - rejected) - batch["gamma"])
            else:
                expected = -chosen - batch["beta"] * log_sigmoid(log_odds(chosen) - log_odds(rejected))
            assert math.isclose(per_dimension[pair, d].item(), expected, **EXACT)
            total += weight * expected
        assert math.isclose(losses[pair].item(), total, **EXACT)


probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@given(
    completions=st.lists(st.tuples(probabilities, probabilities), min_size=1, max_size=5),
    temperature=st.floats(0.05, 5),
)
@settings(max_examples=100, deadline=None)
def test_mean_weights_equal_plain_python(completions, temperature):
    def statistics(side):
        columns = [completion[side] for completion in completions]
        means, stds = [fmean(c) for c in columns], [stdev(c) if len(c) > 1 else 0.0 for c in columns]
        return tensor([means]), tensor([stds])

    weights = adaptive_weights(*statistics(0), *statistics(1), scheme="mean", temperature=temperature)
    exponentials = [math.exp((fmean(c) + fmean(r)) / temperature) for c, r in completions]
    expected = [e / sum(exponentials) for e in exponentials]
    assert all(math.isclose(w, e, **EXACT) for w, e in zip(weights[0].tolist(), expected, strict=True))


def test_gaussian_weights_have_the_scores_of_two_independent_normals():
    pairs = 200_000
    mean = [tensor([[0.3, 0.6]]).expand(pairs, 2), tensor([[0.2, 0.1]]).expand(pairs, 2)]
    std = [tensor([[0.4, 0.1]]).expand(pairs, 2), tensor([[0.3, 0.2]]).expand(pairs, 2)]
    generator = torch.Generator().manual_seed(0)
    weights = adaptive_weights(mean[0], std[0], mean[1], std[1], generator=generator)
    difference = (weights[:, 0] / weights[:, 1]).log()
    # The difference of the two dimensions' scores: means 0.5 and 0.7, variances 0.4^2 + 0.3^2 and 0.1^2 + 0.2^2.
    assert difference.mean().item() == pytest.approx(-0.2, abs=0.005)
    assert difference.std().item() == pytest.approx(math.sqrt(0.25 + 0.05), abs=0.005)


def test_a_one_token_completion_is_drawn_at_its_mean():
    one_token = (tensor([[0.2, 0.9]]), torch.zeros(1, 2, dtype=torch.float64))
    drawn = adaptive_weights(*one_token, *one_token)
    assert torch.equal(drawn, adaptive_weights(*one_token, *one_token, scheme="mean"))


def test_pairs_of_a_batch_do_not_change_each_others_weights():
    mean, std = torch.rand(3, 4), torch.zeros(3, 4)
    together = adaptive_weights(mean, std, mean, std)
    assert torch.allclose(together.sum(-1), torch.ones(3))
    assert torch.equal(together[1:2], adaptive_weights(mean[1:2], std[1:2], mean[1:2], std[1:2]))


def test_no_gradient_flows_through_weights_and_rewards():
    values = torch.rand(2, 3, requires_grad=True)
    assert not adaptive_weights(values, values, values, values).requires_grad
    weights = torch.full((2, 3), 1 / 3, requires_grad=True)
    losses, _ = amopo_loss(-values, -2 * values, torch.ones(2, 3), torch.ones(2, 3), weights, beta=1.0, gamma=0.0)
    losses.sum().backward()
    assert weights.grad is None
    _, chosen, rejected = modpo_loss(
        *(-values[:, 0],) * 4, values, values, beta=0.1, objective_weight=0.5, margin_weights=torch.ones(3)
    )
    assert not chosen.requires_grad
    assert not rejected.requires_grad


@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e-3, -20.0, -5000.0])
def test_orpo_and_its_gradient_are_finite_at_the_ends(logp):
    for dtype in (torch.float32, torch.float64):
        chosen = torch.tensor([[logp]], dtype=dtype, requires_grad=True)
        rejected = torch.tensor([[logp]], dtype=dtype, requires_grad=True)
        one = torch.ones(1, 1, dtype=dtype)
        losses, _ = amopo_loss(chosen, rejected, one, one, one, beta=0.1, gamma=0.0, loss_type="orpo")
        losses.sum().backward()
        assert losses.isfinite().all()
        assert chosen.grad.isfinite().all()
        assert rejected.grad.isfinite().all()


@pytest.mark.parametrize("logp", [-1e-6, -1e-4, -0.01, -0.69, -0.7, -3.0, -80.0])
def test_orpo_is_exact_in_single_precision(logp):
    """Near a certain token, 1 - p is a small difference of numbers that float32 rounds."""
    one = torch.ones(1, 1)
    losses, _ = amopo_loss(
        torch.tensor([[logp]]), torch.tensor([[-2.0]]), one, one, one, beta=0.5, gamma=0.0, loss_type="orpo"
    )
    logp = torch.tensor(logp).item()
    expected = -logp - 0.5 * log_sigmoid(log_odds(logp) - log_odds(-2.0))
    assert losses.item() == pytest.approx(expected, rel=2e-6)


def test_draws_are_the_generators_own():
    values = torch.rand(2, 3)

    def drawn(seed):
        torch.manual_seed(0)
        return adaptive_weights(*(values,) * 4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_normal_in_the_precision_of_the_statistics_the_chosen_completions_first(dtype):
    means, stds = torch.rand(2, 3, 4, dtype=dtype), torch.rand(2, 3, 4, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    drawn = [
        mean + std * torch.randn(3, 4, generator=generator, dtype=dtype) for mean, std in zip(means, stds, strict=True)
    ]
    generator.manual_seed(7)
    weights = adaptive_weights(means[0], stds[0], means[1], stds[1], generator=generator)
    assert weights.dtype == dtype
    assert torch.allclose(weights, torch.softmax(drawn[0] + drawn[1], dim=-1), rtol=4 * torch.finfo(dtype).eps)


def test_unknown_names_are_refused():
    column, table = torch.zeros(1), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="unknown loss_type 'ipo': use 'sigmoid' or 'hinge'"):
        modpo_loss(*(column,) * 4, table, table, beta=1, objective_weight=1, margin_weights=column, loss_type="ipo")
    with pytest.raises(ValueError, match="unknown loss_type 'dpo': use 'simpo' or 'orpo'"):
        amopo_loss(*(table,) * 5, beta=1, gamma=0, loss_type="dpo")
    with pytest.raises(ValueError, match="unknown scheme 'uniform': use 'gaussian' or 'mean'"):
        adaptive_weights(*(table,) * 4, scheme="uniform")

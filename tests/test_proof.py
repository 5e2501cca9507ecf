"""The proof: in a closed world, MODPO trained by the real command reaches the optimum of multi-objective RLHF."""

import math
from collections import Counter

import pytest
import torch
from proof.runs import BETA, World, modpo_run
from proof.world import (
    OBJECTIVES,
    PROMPTS,
    RESPONSES,
    distance,
    divergence,
    front,
    optimum,
    pairs,
    rewards,
)
from warm import python

from axolotl_mopo.losses import modpo_loss

TWO = [{"helpful": weight, "harmless": round(1 - weight, 1)} for weight in (0.1, 0.3, 0.5, 0.7, 0.9)]
THREE = [
    dict(zip(OBJECTIVES, weights, strict=True))
    for weights in [(0.1, 0.6, 0.3), (0.3, 0.3, 0.4), (0.5, 0.3, 0.2), (0.7, 0.1, 0.2), (0.9, 0.05, 0.05)]
]


@pytest.fixture
def some_policies():
    """Two distributions [prompts, responses] over the responses."""
    logits = torch.randn(2, len(PROMPTS), len(RESPONSES), generator=torch.Generator().manual_seed(3)).double()
    return torch.softmax(logits, -1)


@pytest.mark.parametrize("weights", TWO + THREE)
def test_the_optimum_is_that_of_multi_objective_rlhf(some_policies, weights):
    """What a policy lacks in E[sum w r] - beta KL(policy || reference) is exactly beta KL(policy || optimum)."""
    reference, policy = some_policies
    collective = sum(weight * rewards()[OBJECTIVES.index(name)] for name, weight in weights.items())

    def value(policy):
        return (policy * collective).sum(-1).mean().item() - BETA * divergence(policy, reference)

    best = optimum(reference, weights, BETA)
    assert value(best) - value(policy) == pytest.approx(BETA * divergence(policy, best), rel=1e-12)


def test_pairs_stand_in_exact_bradley_terry_proportions():
    for index, objective in enumerate(OBJECTIVES):
        counts = Counter((row["prompt"], row["chosen"], row["rejected"]) for row in pairs(objective))
        for (prompt, chosen, rejected), count in counts.items():
            table = rewards()[index, PROMPTS.index(prompt)]
            preferred = torch.sigmoid(table[RESPONSES.index(chosen)] - table[RESPONSES.index(rejected)]).item()
            assert count / (count + counts[prompt, rejected, chosen]) == pytest.approx(preferred, rel=1e-12)


@pytest.mark.parametrize("weights", TWO + THREE)
def test_the_loss_is_stationary_at_the_optimum_and_nowhere_near_it(some_policies, weights):
    reference, other = some_policies
    objective, *others = weights
    rows = list(pairs(objective))
    prompts = torch.tensor([PROMPTS.index(row["prompt"]) for row in rows])
    sides = {side: torch.tensor([RESPONSES.index(row[side]) for row in rows]) for side in ("chosen", "rejected")}
    margins = {side: torch.tensor([[row[f"{side}_{name}"] for name in others] for row in rows]) for side in sides}

    def slope(policy):
        logits = policy.log().requires_grad_()
        logps = torch.log_softmax(logits, -1)
        loss, *_ = modpo_loss(
            *(logps[prompts, sides[side]] for side in sides),
            *(reference.log()[prompts, sides[side]] for side in sides),
            *(margins[side].double() for side in sides),
            beta=BETA,
            objective_weight=weights[objective],
            margin_weights=torch.tensor([weights[name] for name in others], dtype=torch.float64),
        )
        (gradient,) = torch.autograd.grad(loss.mean(), logits)
        return gradient.norm().item()

    assert slope(optimum(reference, weights, BETA)) < 1e-8
    assert slope(other) > 1e-2


def test_distances_are_measured_from_the_front(some_policies):
    reference, other = some_policies
    names = OBJECTIVES[:2]
    exact = front(reference, names, BETA, steps=100)
    gains = exact.diff(dim=0)
    assert (gains[:, 0] > 0).all()  # more weight on helpful: more helpful, less harmless
    assert (gains[:, 1] < 0).all()
    assert distance(optimum(reference, {"helpful": 0.3, "harmless": 0.7}, BETA), exact, names) == 0
    # Half-way between two points of the line.
    gap = ((exact[31] - exact[30]) / (exact.amax(0) - exact.amin(0))).norm().item()
    between = optimum(reference, {"helpful": 0.305, "harmless": 0.695}, BETA)
    assert distance(between, exact, names) == pytest.approx(gap / 2, rel=0.05)
    assert distance(other, exact, names) > 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("proof"), run=lambda command, **where: python(*command, **where))
    world.fit_reference()
    return world


@pytest.mark.xdist_group("proof")  # they share the world
@pytest.mark.parametrize("mixtures", [TWO, THREE], ids=["two", "three"])
def test_training_reaches_the_optimum(world, mixtures):
    runs = [modpo_run(f"{len(weights)}-{number}", "helpful", weights) for number, weights in enumerate(mixtures)]
    world.train(runs)
    reference, _ = world.read()
    names = list(mixtures[0])
    exact = front(reference, names, BETA, steps=500 if len(names) == 2 else 100)
    for run, weights in zip(runs, mixtures, strict=True):
        policy, mass = world.read((run.name, 1.0))
        best = optimum(reference, weights, BETA)
        assert divergence(policy, best) <= 0.02, weights
        assert divergence(policy, best) < divergence(reference, best) / 10, weights
        assert distance(policy, exact, names) <= 0.02, weights
        assert math.isfinite(mass)

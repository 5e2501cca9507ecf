"""MODPO's front beside the exact one and beside baselines that need no RL: `python -m tests.proof.front`.

Trains every policy by `axolotl train` on a CPU, prints a table and draws `front.svg` beside this file. Baselines:
arXiv 2310.03708, section 4: DPO soups (the adapters of single-objective policies, interpolated) and DPO loss
weighting (one DPO run on the pairs of both objectives). All share steps, learning rate, LoRA and beta.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor

from .runs import BETA, Run, World, dpo_run, modpo_run
from .world import OBJECTIVES, distance, divergence, expected_rewards, front, optimum

FIGURE = Path(__file__).with_suffix(".svg")
WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
THREE = ((0.1, 0.6, 0.3), (0.3, 0.3, 0.4), (0.5, 0.3, 0.2), (0.7, 0.1, 0.2), (0.9, 0.05, 0.05))
Weights = Mapping[str, float]
Policies = list[tuple[Weights, tuple[Tensor, float]]]


def two(weight: float) -> Weights:
    """Helpful against harmless."""
    return {"helpful": weight, "harmless": round(1 - weight, 1)}


def train(world: World) -> dict[str, Policies]:
    """Every method's policies, with the weights that each was made for."""
    world.fit_reference()
    world.train([dpo_run(name, {name: 1}) for name in OBJECTIVES])
    margin = {"source": "adapter", "path": str(world.adapter("harmless")), "beta": BETA}
    mixtures = {"MODPO": [two(weight) for weight in WEIGHTS]}
    mixtures |= {"MODPO, adapter margin": mixtures["MODPO"], "DPO loss weighting": mixtures["MODPO"]}
    mixtures |= {"MODPO, 3 objectives": [dict(zip(OBJECTIVES, weights, strict=True)) for weights in THREE]}
    runs = {
        method: [_run(method, number, weights, margin) for number, weights in enumerate(each)]
        for method, each in mixtures.items()
    }
    world.train([run for each in runs.values() for run in each])
    policies: dict[str, Policies] = {
        method: [(weights, world.read((run.name, 1.0))) for run, weights in zip(runs[method], each, strict=True)]
        for method, each in mixtures.items()
    }
    policies["DPO soups"] = [(weights, world.read(*weights.items())) for weights in mixtures["MODPO"]]
    policies["DPO soups, 3 objectives"] = [
        (weights, world.read(*weights.items())) for weights in mixtures["MODPO, 3 objectives"]
    ]
    return policies


def _run(method: str, number: int, weights: Weights, margin: Mapping) -> Run:
    name = f"{method.replace(' ', '-').replace(',', '')}-{number}".lower()
    if method == "DPO loss weighting":
        parts = {objective: round(10 * weight) for objective, weight in weights.items()}
        return dpo_run(name, {key: 1 if part == 5 else part for key, part in parts.items()})
    return modpo_run(name, "helpful", weights, **(margin if "adapter" in method else {}))


def table(reference: Tensor, policies: Mapping[str, Policies]) -> str:
    """KL to the optimum and distance to the front of every policy, as Markdown."""
    lines = [
        "| method | weights | KL to the optimum, nats | distance to the front | mass |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, each in policies.items():
        for weights, (policy, mass) in each:
            exact = front(reference, list(weights), BETA, steps=500 if len(weights) == 2 else 100)
            divergent = divergence(policy, optimum(reference, weights, BETA))
            apart = distance(policy, exact, list(weights))
            mixture = ", ".join(f"{weight:g}" for weight in weights.values())
            lines.append(f"| {method} | {mixture} | {divergent:.4f} | {apart:.2%} | {mass:.2f} |")
    return "\n".join(lines)


def draw(reference: Tensor, policies: Mapping[str, Policies], path: Path) -> None:
    """The exact front of two objectives as a line, the policies as points."""
    marks = {"MODPO": "o", "MODPO, adapter margin": "s", "DPO soups": "^", "DPO loss weighting": "x"}
    plt.rcParams |= {"svg.hashsalt": "front", "svg.fonttype": "none"}
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    axes.plot(*front(reference, ["helpful", "harmless"], BETA, steps=200).T, color="0.4", label="exact front", zorder=1)
    for method, mark in marks.items():
        points = [expected_rewards(policy) for _, (policy, _) in policies[method]]
        axes.plot(*zip(*((p["helpful"], p["harmless"]) for p in points), strict=True), mark, label=method, mfc="none")
    start = expected_rewards(reference)
    axes.plot(start["helpful"], start["harmless"], "*", color="0.4", label="reference")
    axes.set(xlabel="expected reward, helpful", ylabel="expected reward, harmless")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keeps data, policies and logs here")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder)
    policies = train(world)
    reference, _ = world.read()
    print(table(reference, policies))
    draw(reference, policies, FIGURE)


if __name__ == "__main__":
    main()

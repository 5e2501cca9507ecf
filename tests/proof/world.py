"""A closed world in which MODPO's optimum is known: a few prompts, 39 responses each, and rewards that conflict.

arXiv 2310.03708 claims that MODPO's optimum is the one of multi-objective RLHF,

    pi*(y|x) ~ pi_ref(y|x) * exp( (w_k r_k(x, y) + sum_j w_j r_j(x, y)) / beta ).

Here every response can be enumerated, so pi* is a table of numbers. Preference pairs stand in exact Bradley-Terry
proportions: rewards are multiples of ln 2, so that sigmoid(r(y) - r(y')) is 1/2, 2/3 or 4/5, and a pair is written
once for each of the 2, 3 or 5 people who were asked. No sampling noise is left in the data.
"""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = ["One.", "Two.", "Three."]
LETTERS = "ABC"
RESPONSES = ["".join(letters) for length in (1, 2, 3) for letters in product(LETTERS, repeat=length)]
OBJECTIVES = ["helpful", "harmless", "brief"]
NEIGHBOURS = 2
"""Every response is compared with the next so many of a random circle, hence with twice as many in all."""


@cache
def rewards() -> Tensor:
    """Rewards [objectives, prompts, responses]: 0, 1 or 2 times ln 2. What is helpful is seldom harmless or brief.

    It is helpful to say a letter that the prompt asks for, harmless to say the next one, and brief to say little.
    """
    levels = []
    for number in range(len(PROMPTS)):
        levels.append(
            [
                [min(response.count(_letter(number, 0)), 2) for response in RESPONSES],
                [min(response.count(_letter(number, 1)), 2) for response in RESPONSES],
                [3 - len(response) for response in RESPONSES],
            ]
        )
    return torch.tensor(levels, dtype=torch.float64).transpose(0, 1) * math.log(2)


def optimum(reference: Tensor, weights: Mapping[str, float], beta: float) -> Tensor:
    """The policy [prompts, responses] that is best under a weighting, in closed form."""
    collective = sum(weight * rewards()[OBJECTIVES.index(name)] for name, weight in weights.items())
    return torch.softmax(reference.log() + collective / beta, -1)


def expected_rewards(policy: Tensor) -> dict[str, float]:
    """Mean reward of each objective over prompts and responses."""
    return {name: (policy * rewards()[index]).sum(-1).mean().item() for index, name in enumerate(OBJECTIVES)}


def divergence(policy: Tensor, other: Tensor) -> float:
    """KL(policy || other) in nats, mean over the prompts."""
    return (policy * (policy / other).log()).sum(-1).mean().item()


def front(reference: Tensor, names: Sequence[str], beta: float, steps: int) -> Tensor:
    """The exact front of some objectives: expected rewards [points, objectives] at all weights in steps of 1/steps."""
    grid = [point for point in product(range(steps + 1), repeat=len(names)) if sum(point) == steps]
    mixtures = (dict(zip(names, (part / steps for part in point), strict=True)) for point in grid)
    return torch.stack([_coordinates(optimum(reference, weights, beta), names) for weights in mixtures])


def distance(policy: Tensor, exact: Tensor, names: Sequence[str]) -> float:
    """Distance of a policy's expected rewards to the nearest point of a front, as a part of the front's span."""
    span = exact.amax(0) - exact.amin(0)
    return ((_coordinates(policy, names) - exact) / span).norm(dim=-1).min().item()


def _coordinates(policy: Tensor, names: Sequence[str]) -> Tensor:
    means = expected_rewards(policy)
    return torch.tensor([means[name] for name in names], dtype=torch.float64)


@torch.no_grad()
def read_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, float]:
    """What a model says.

    Returns:
        Its distribution over the responses to each prompt, [prompts, responses]; and the probability, mean over the
        prompts, that it answers with one of them at all.
    """
    model.eval()
    logps = []
    for prompt in PROMPTS:
        head = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        start = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        texts = [f"{head}{response}<|im_end|>" for response in RESPONSES]
        rows = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        targets = rows["input_ids"][:, start:]
        scores = torch.log_softmax(model(**rows).logits[:, start - 1 : -1].double(), -1)
        each = scores.gather(-1, targets[..., None]).squeeze(-1)
        logps.append((each * rows["attention_mask"][:, start:]).sum(-1))
    joint = torch.stack(logps)
    return torch.softmax(joint, -1), joint.exp().sum(-1).mean().item()


def write_demonstrations(path: Path) -> None:
    """Conversations to fit the reference to: it has a liking for the letter that is neither helpful nor harmless."""
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}
        for number, prompt in enumerate(PROMPTS)
        for response in RESPONSES
        for _ in range(1 + response.count(_letter(number, 2)))
    ]
    _write(path, rows)


def pairs(objective: str) -> Iterator[dict]:
    """Pairs that one objective orders, with the rewards of all objectives."""
    rng = random.Random(2)
    index = OBJECTIVES.index(objective)
    for number, prompt in enumerate(PROMPTS):
        table = rewards()[:, number]
        circle = rng.sample(range(len(RESPONSES)), len(RESPONSES))
        for place, first in enumerate(circle):
            for step in range(1, NEIGHBOURS + 1):
                second = circle[(place + step) % len(circle)]
                worse, better = sorted((first, second), key=lambda response: table[index, response])
                odds = round(math.exp(table[index, better] - table[index, worse]))
                for chosen, rejected in [(better, worse)] * odds + [(worse, better)]:
                    yield {
                        "prompt": prompt,
                        "chosen": RESPONSES[chosen],
                        "rejected": RESPONSES[rejected],
                        **{f"chosen_{name}": table[i, chosen].item() for i, name in enumerate(OBJECTIVES)},
                        **{f"rejected_{name}": table[i, rejected].item() for i, name in enumerate(OBJECTIVES)},
                    }


def write_pairs(path: Path, objective: str, repeat: int = 1) -> None:
    """`pairs` as a file, each of them so many times."""
    _write(path, [row for row in pairs(objective) for _ in range(repeat)])


def _letter(prompt: int, step: int) -> str:
    return LETTERS[(prompt + step) % len(LETTERS)]


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

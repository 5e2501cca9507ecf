"""A synthetic safety task: questions ask how to do things; steps make an answer helpful, cautions make it harmless.

    python example_configs/gallery/safety.py        # writes outputs/gallery/safety

A response has three sentences, so every caution replaces a step. Rows have the format of PKU-SafeRLHF: two responses,
which of them is `better` and which is `safer`. Both labels are drawn by Bradley-Terry, on the number of steps and on
the number of cautions. `axolotl mopo score` uses the functions `helpful` and `harmless`.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OUTPUT = Path("outputs/gallery/safety")
DEMONSTRATIONS, PAIRS, PROMPTS = 1500, 3000, 48

QUESTIONS = [
    f"How do I {verb} a {thing}?"
    for verb in ("open", "close", "light", "mix", "climb", "lift", "cut", "bend", "move", "clean")
    for thing in ("gate", "lamp", "barrel", "wall", "rope", "pipe", "boat", "box", "wheel", "roof", "stove", "saw")
]
STEPS = """
Take a long rope. Hold it with both hands. Turn it slowly. Push it hard. Heat it well. Pull the small lever. Put it on a
table. Fill it with water. Tie a firm knot. Press the red button.
"""
CAUTIONS = """
Wear thick gloves. Ask an adult first. Keep some water near. Never do it alone. Stop if it smells. Read the label first.
Mind your fingers. Cover your eyes. Call for help early. Check it twice.
"""
FILLERS = """
That is a good question. Many people ask this. It depends on the day. Some say it is easy. There are many ways. Let me
think about it. My uncle knows it well. It was done before.
"""
KINDS = [
    [f"{part.strip()}." for part in " ".join(text.split()).split(".") if part] for text in (STEPS, CAUTIONS, FILLERS)
]


def helpful(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """The number of steps in each response."""
    return [float(sum(response.count(step) for step in KINDS[0])) for response in responses]


def harmless(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """The number of cautions in each response."""
    return [float(sum(response.count(caution) for caution in KINDS[1])) for response in responses]


def main() -> None:
    """Write demonstrations, pairs and held-out prompts."""
    rng = random.Random(0)
    questions = rng.sample(QUESTIONS, len(QUESTIONS))
    held_out, known = questions[:PROMPTS], questions[PROMPTS:]

    def response() -> str:
        return " ".join(rng.choice(rng.choice(KINDS)) for _ in range(3))

    def first_wins(scores: Sequence[float]) -> bool:
        return rng.random() < 1 / (1 + math.exp(scores[1] - scores[0]))

    def pair() -> dict[str, Any]:
        both = [response(), response()]
        while both[0] == both[1]:
            both[1] = response()
        return {
            "prompt": rng.choice(known),
            "response_0": both[0],
            "response_1": both[1],
            "better_response_id": 0 if first_wins(helpful([], both)) else 1,
            "safer_response_id": 0 if first_wins(harmless([], both)) else 1,
        }

    _write("demonstrations", [_demonstration(rng.choice(known), response()) for _ in range(DEMONSTRATIONS)])
    _write("pairs", [pair() for _ in range(PAIRS)])
    _write("prompts", [{"prompt": question} for question in held_out])


def _demonstration(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _write(name: str, rows: Sequence[dict[str, Any]]) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row) + "\n" for row in rows)
    (OUTPUT / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

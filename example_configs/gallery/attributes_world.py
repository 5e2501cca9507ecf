"""The synthetic data of `attributes.py`: responses of one to four sentences, and their scores on every attribute.

Most sentences raise one attribute, some raise two, some raise one and lower another. Each sentence makes its response
less brief.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl_mopo.config import AMoPOConfig
from axolotl_mopo.data.conversations import user, with_directive

ATTRIBUTES = ["informative", "polite", "brief", "careful", "vivid"]
RANGE = (-4, 4)
"""Range of the scores of all attributes."""
LONGEST = 4

SENTENCES: list[tuple[dict[str, int], str]] = [
    ({}, "That is one question. People ask it often. There is much to say. It was a long day."),
    ({"informative": 1}, "It is made of iron. It came from the north. It weighs two tons. It is a hundred years old."),
    (
        {"informative": 1, "polite": -1},
        "Look it up, it is iron. Everyone knows it is old. Obviously it is heavy. Do not ask twice, it is northern.",
    ),
    (
        {"informative": 1, "vivid": 1, "careful": -1},
        "Its iron burns like the sun. It thunders with two tons. Its age outlasts the stars. The icy north sang.",
    ),
    (
        {"informative": 1, "careful": 1, "vivid": -1},
        "It is iron, as far as I know. It is old, most say. It may weigh two tons. They say it is northern.",
    ),
    ({"polite": 1}, "Thank you for asking. I am glad to help. You are most welcome. What a kind question."),
    (
        {"informative": 1, "polite": 1},
        "Gladly, it is iron. If I may, it weighs two tons. With pleasure, it is old. Kindly note, it is northern.",
    ),
    ({"careful": 1}, "Please check a source. I could be wrong. Opinions differ here. Ask an expert first."),
    ({"vivid": 1}, "It glows in red and gold. It roars in the night. It smells of rain. It dances in the wind."),
    (
        {"vivid": 1, "polite": -1},
        "Wake up, it roars at you. Only the blind miss its gold. A dull ear hears no storm. Fools sleep through it.",
    ),
]
EFFECTS = {f"{part.strip()}.": effects for effects, text in SENTENCES for part in text.split(".") if part.strip()}
QUESTIONS = [
    shape.format(verb, thing)
    for shape in ("Can you {} the {}?", "How would you {} the {}?", "Please {} the {} to me.", "I want to {} the {}.")
    for verb in ("describe", "explain", "show", "introduce", "present", "sketch")
    for thing in ("bell", "bridge", "tower", "clock", "engine", "statue", "gate", "anchor", "crane", "mill", "lamp")
]


def rate(response: str) -> dict[str, int]:
    """The score of a response on every attribute, within `RANGE`. An empty response has 0 for brief."""
    shown = [EFFECTS[sentence] for sentence in sentences(response)]
    counts = {name: sum(effects.get(name, 0) for effects in shown) for name in ATTRIBUTES}
    return {**counts, "brief": max(RANGE[0], LONGEST - len(shown)) if shown else 0}


def sentences(response: str) -> list[str]:
    """The known sentences in a response. Other text has no score."""
    parts = (f"{part.strip()}." for part in response.split("."))
    return [part for part in parts if part in EFFECTS]


@dataclass
class World:
    """Draws the data.

    Args:
        seed: random seed of the data. The held-out questions are the same for all seeds.
    """

    seed: int

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        questions = random.Random(0).sample(QUESTIONS, len(QUESTIONS))
        self.held_out, self.known = questions[:48], questions[48:]

    def response(self) -> str:
        """An answer drawn independently of all attributes."""
        kinds = [text.split(". ") for _, text in SENTENCES]
        return " ".join(
            f"{self.rng.choice(self.rng.choice(kinds)).removesuffix('.')}." for _ in range(self.rng.randint(1, LONGEST))
        )

    def demonstrations(self, settings: Sequence[AMoPOConfig], count: int = 2400) -> Iterator[dict[str, Any]]:
        """Answers to questions. Every other question has a directive, which the answer ignores."""
        for number in range(count):
            messages = user(self.rng.choice(self.known))
            if number % 2:
                block = self.rng.choice(settings)
                scores = {name: self.rng.randint(1, 5) for name in block.dimensions}
                messages = with_directive(messages, self.rng.choice(block.training_directives(scores)))
            yield {"messages": [*messages, assistant(self.response())]}

    def rows(self, questions: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
        """Questions with two responses each, whose scores differ."""
        for _ in range(count):
            both = self.response(), self.response()
            while rate(both[0]) == rate(both[1]):
                both = both[0], self.response()
            yield {"prompt": user(self.rng.choice(questions)), "both": both, "scores": [rate(text) for text in both]}

    def ordered(self, row: dict[str, Any], attributes: Sequence[str]) -> dict[str, Any]:
        """A pair; Bradley-Terry on the sum of some attributes draws the chosen response."""
        first, second = (sum(scores[name] for name in attributes) for scores in row["scores"])
        chosen = 0 if self.rng.random() < 1 / (1 + math.exp(second - first)) else 1
        return {
            "prompt": row["prompt"],
            "chosen": row["both"][chosen],
            "rejected": row["both"][1 - chosen],
            "chosen_scores": row["scores"][chosen],
            "rejected_scores": row["scores"][1 - chosen],
        }


def write(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def assistant(content: str) -> dict[str, str]:
    """A message of the assistant."""
    return {"role": "assistant", "content": content}

"""How our step grows with dimensions and with the prompt, beside its tokens: `python -m tests.benchmarks.scaling`."""

import argparse
import os

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}

import torch

from .contestants import STEPS
from .measuring import measure
from .models import SHAPES, build
from .pairs import typical_pair

DIMENSIONS = (2, 4, 8)
QUESTIONS = (100, 300, 1000, 3000)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-34m")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = build(options.shape, getattr(torch, options.dtype), options.device, options.attention, 0, False)
    cases = [(dimensions, 244) for dimensions in DIMENSIONS] + [(4, question) for question in QUESTIONS]
    vocabulary = SHAPES[options.shape]["vocab_size"]
    contestants = [
        STEPS["packed"](model, [typical_pair(dimensions, vocabulary, question)], "amopo", options.device)
        for dimensions, question in cases
    ]
    print(f"{'D':>3}{'question':>10}{'tokens':>9}{'seconds':>10}{'us a token':>12}{'MiB':>8}")
    for (dimensions, question), taken in zip(
        cases, measure(model, contestants, options.rounds, options.device), strict=True
    ):
        print(
            f"{dimensions:3}{question:10,}{taken.tokens:9,}{taken.median:10.3f}"
            f"{1e6 * taken.median / taken.tokens:12.0f}{taken.peak_bytes / 2**20:8.0f}"
        )


if __name__ == "__main__":
    main()

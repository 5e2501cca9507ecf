"""Preference pairs of random tokens, as long as those of known kinds of data."""

import random
from collections.abc import Sequence

from axolotl_mopo.logprobs.trees import Pair

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles that `KINDS` records; between them lengths are interpolated."""

KINDS = {
    # Tokens of the question and of a response at LEVELS: estimates, from what the data sets' papers and cards say of
    # their lengths. The last kind has several turns before the question.
    "helpsteer2": ((12, 30, 90, 350, 1100), (40, 150, 260, 400, 750)),
    "ultrafeedback": ((15, 40, 90, 220, 700), (30, 140, 280, 430, 760)),
    "multi-turn": ((300, 700, 1200, 2000, 3000), (40, 120, 240, 400, 700)),
}
_DIRECTIVE_TOKENS = 150
_INTEGRATED_TOKENS = 60
_SMALLEST_TOKEN = 10


def draw_pairs(
    kind: str, count: int, dimensions: int, vocabulary: int, seed: int = 0, question_tokens: int | None = None
) -> list[Pair]:
    """Pairs with one prompt for each dimension: a directive of its own before the same question, as AMoPO has it.

    Args:
        kind: a key of `KINDS`.
        count: of pairs.
        dimensions: prompts of a pair, the integrated one counted; a single prompt has no directive.
        vocabulary: number of tokens to draw from.
        seed: of the draws.
        question_tokens: length of every question, in the place of the kind's.
    """
    rng = random.Random(seed)
    questions, responses = KINDS[kind]

    def tokens(length: int) -> list[int]:
        return [rng.randrange(_SMALLEST_TOKEN, vocabulary) for _ in range(length)]

    lengths = [_INTEGRATED_TOKENS, *[_DIRECTIVE_TOKENS] * (dimensions - 1)] if dimensions > 1 else [0]
    directives = [tokens(length) for length in lengths]
    pairs = []
    for _ in range(count):
        question = tokens(question_tokens or _draw(questions, rng))
        chosen, rejected = (tokens(_draw(responses, rng)) for _ in range(2))
        pairs.append(Pair([[*directive, *question] for directive in directives], chosen, rejected))
    return pairs


def typical_pair(dimensions: int, vocabulary: int, question_tokens: int = 244) -> Pair:
    """One pair whose lengths are the means of many drawn HelpSteer2 pairs: question, longer and shorter response."""
    (pair,) = draw_pairs("helpsteer2", 1, dimensions, vocabulary, question_tokens=question_tokens)
    rng = random.Random(1)
    chosen, rejected = ([rng.randrange(_SMALLEST_TOKEN, vocabulary) for _ in range(length)] for length in (397, 201))
    return pair._replace(chosen=chosen, rejected=rejected)


def _draw(quantiles: Sequence[int], rng: random.Random) -> int:
    level = rng.uniform(LEVELS[0], LEVELS[-1])
    upper = next(index for index, known in enumerate(LEVELS) if known >= level) or 1
    low, high = LEVELS[upper - 1], LEVELS[upper]
    share = (level - low) / (high - low)
    return max(1, round(quantiles[upper - 1] + share * (quantiles[upper] - quantiles[upper - 1])))

"""What a user should know of the prepared rows before training on them."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from axolotl_mopo.data.columns import numbers


def notes(train: Dataset, evaluation: Dataset | None) -> Iterator[str]:
    """What was cut to fit into `sequence_len`, and how many prompts are in both sets."""
    for name, rows in (("training", train), ("evaluation", evaluation)):
        if rows is None:
            continue
        for what, column in (("prompts", "cut_prompt_tokens"), ("completions", "cut_completion_tokens")):
            cut = numbers(rows, column)
            if count := int((cut > 0).sum()):
                yield (
                    f"{count:,} of {len(cut):,} {name} pairs have {what} that were cut to fit into sequence_len, by "
                    f"{cut[cut > 0].mean():.0f} tokens on average."
                )
    if evaluation is not None:
        known = np.isin(numbers(evaluation, "prompt_key"), numbers(train, "prompt_key"))
        if known.any():
            yield (
                f"{int(known.sum()):,} of {len(known):,} evaluation pairs have a prompt that is in the training set as "
                "well, so that the evaluation flatters; keep the prompts of both apart."
            )

"""What a user should know about the prepared rows before training on them."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from axolotl_mopo.logprobs.passes import pass_tokens, split_into_passes
from axolotl_mopo.training.collator import PairCollator, read_tokens
from axolotl_mopo.training.prepared_rows import LENGTH, numbers


def row_warnings(train: Dataset, evaluation: Dataset | None) -> Iterator[str]:
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


def budget_message(rows: Dataset, collator: PairCollator) -> str | None:
    """What `max_tokens_per_pass` means for rows that are too long for it by themselves, or None where none is."""
    if collator.max_tokens is None:
        return None
    if collator.packed:  # no trie has more tokens than its sequences
        rows_in_doubt = rows.select(np.flatnonzero(numbers(rows, LENGTH) > collator.max_tokens))
    else:
        rows_in_doubt = rows
    split = alone = 0
    for row in rows_in_doubt:
        pair = read_tokens(row)
        [passes] = split_into_passes([pair], collator.max_tokens, collator.packed)
        split += len(passes) > 1
        alone += any(pass_tokens(pair, one, collator.packed) > collator.max_tokens for one in passes)
    if not split and not alone:
        return None
    message = f"of {len(rows):,} pairs, {split:,} are split by their prompts to keep to max_tokens_per_pass"
    if split:
        message += ", and take one more forward pass, without gradient, each time"
    if alone:
        message += f"; {alone:,} exceed it all the same, since a prompt and its two completions are not split"
    return message

"""Messages about the prepared rows before training."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from axolotl_mopo.logprobs.passes import pass_tokens, split_into_passes
from axolotl_mopo.training.collator import PairCollator, read_tokens
from axolotl_mopo.training.prepared_rows import LENGTH, numbers


def row_warnings(train: Dataset, evaluation: Dataset | None) -> Iterator[str]:
    """Yield warnings about truncated pairs, and about prompts that are in both sets."""
    for name, rows in (("training", train), ("evaluation", evaluation)):
        if rows is None:
            continue
        for what, column in (("prompts", "cut_prompt_tokens"), ("completions", "cut_completion_tokens")):
            cut = numbers(rows, column)
            if count := int((cut > 0).sum()):
                yield (
                    f"{count:,} of {len(cut):,} {name} pairs have {what} that were truncated to fit into sequence_len, "
                    f"by {cut[cut > 0].mean():.0f} tokens on average; raise `sequence_len` to avoid this."
                )
    if evaluation is not None:
        known = np.isin(numbers(evaluation, "prompt_key"), numbers(train, "prompt_key"))
        if known.any():
            yield (
                f"{int(known.sum()):,} of {len(known):,} evaluation pairs have a prompt that is also in the training "
                "set, so evaluation metrics are too good; use separate prompts for evaluation."
            )


def budget_message(rows: Dataset, collator: PairCollator) -> str | None:
    """Return a message about rows that are longer than `max_tokens_per_pass`, or None if there are none."""
    if collator.max_tokens is None:
        return None
    if collator.packed:  # a trie has at most as many tokens as its sequences
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
    message = f"of {len(rows):,} pairs, {split:,} are split by their prompts to fit into max_tokens_per_pass"
    if split:
        message += ", and need an additional forward pass without gradient in every step"
    if alone:
        message += f"; {alone:,} still exceed it, since a prompt and its two completions are never split"
    return message

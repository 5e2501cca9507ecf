"""How long prepared rows are, and what a budget of tokens means for them."""

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from axolotl_mopo.data.collating import PairCollator, read_tokens
from axolotl_mopo.data.columns import numbers, stored, with_numbers
from axolotl_mopo.engine.packing import share_out, share_size

LENGTH = "length"
"""The column by which the host groups rows of like length."""

_TOKENS = ["prompt_input_ids", "chosen_input_ids", "rejected_input_ids"]


def with_lengths(rows: Dataset) -> Dataset:
    """The rows with a column of their lengths."""
    return rows if LENGTH in rows.column_names else with_numbers(rows, LENGTH, pair_lengths(rows))


def pair_lengths(rows: Dataset) -> NDArray[np.int64]:
    """Tokens of every pair [N]: each of its prompts, and both completions for each of them."""
    lengths = []
    table, selected = stored(rows)
    for batch in table.select_columns(_TOKENS).with_format("arrow").iter(1000):
        prompts, *sides = (batch[name].combine_chunks() for name in _TOKENS)
        tokens = pc.list_value_length(pc.list_flatten(prompts))
        in_prompts = np.bincount(pc.list_parent_indices(prompts), weights=tokens, minlength=len(prompts))
        completions = sum(pc.list_value_length(side).to_numpy() for side in sides)
        lengths.append(in_prompts.astype(np.int64) + pc.list_value_length(prompts).to_numpy() * completions)
    all_lengths = np.concatenate(lengths) if lengths else np.empty(0, np.int64)
    return all_lengths if selected is None else all_lengths[selected]


def budget_message(rows: Dataset, collator: PairCollator) -> str | None:
    """What `max_tokens_per_step` means for rows that are too long for it by themselves, or None where none is."""
    if collator.max_tokens is None:
        return None
    if collator.packed:  # no trie has more tokens than its sequences
        rows_in_doubt = rows.select(np.flatnonzero(numbers(rows, LENGTH) > collator.max_tokens))
    else:
        rows_in_doubt = rows
    split = alone = 0
    for row in rows_in_doubt:
        pair = read_tokens(row)
        ((*passes,),) = share_out([pair], collator.max_tokens, collator.packed)
        split += len(passes) > 1
        alone += any(share_size(pair, one, collator.packed) > collator.max_tokens for one in passes)
    if not split and not alone:
        return None
    message = f"of {len(rows):,} pairs, {split:,} are split by their prompts to keep to max_tokens_per_step"
    if split:
        message += ", and take one more forward pass, without gradient, each time"
    if alone:
        message += f"; {alone:,} exceed it all the same, since a prompt and its two completions are not split"
    return message

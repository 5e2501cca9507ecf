"""Adds columns of numbers to prepared rows, and computes the rows' lengths.

After a shuffle or a split, `datasets` keeps a table and the indices of the selected rows. A column is added to that
table, so that the rows are not copied.
"""

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

LENGTH = "length"
"""The column by which transformers groups rows of similar length."""

_TOKENS = ["prompt_input_ids", "chosen_input_ids", "rejected_input_ids"]


def stored(rows: Dataset) -> tuple[Dataset, NDArray[np.int64] | None]:
    """Return the table that the rows are selected from, and their indices in it; without a selection, rows and None."""
    indices = rows._indices
    if indices is None:
        return rows, None
    table = Dataset(rows.data, info=rows.info.copy(), split=rows.split, fingerprint=f"{rows._fingerprint}-stored")
    # `datasets` stores unsigned indices, but fails to select adjacent rows with them.
    return table, indices.column(0).to_numpy().astype(np.int64)


def numbers(rows: Dataset, name: str) -> NDArray[Any]:
    """Return a column of numbers [N]."""
    table, selected = stored(rows)
    values = table.data.column(name).to_numpy()
    return values if selected is None else values[selected]


def with_numbers(rows: Dataset, name: str, values: NDArray[np.int64]) -> Dataset:
    """Add a column to rows.

    `datasets` would copy selected rows first; here the column is added to the table that they are selected from.

    Args:
        rows: N rows.
        name: name of the new column.
        values: integers of the column, [N].
    """
    table, selected = stored(rows)
    if selected is None or len(np.unique(selected)) < len(selected):  # a row that is selected twice has two values
        return rows.add_column(name, values)
    column = np.zeros(len(table), np.int64)
    column[selected] = values
    return table.add_column(name, column).select(selected)


def with_lengths(rows: Dataset) -> Dataset:
    """Add a column with the length of each row, if there is none."""
    return rows if LENGTH in rows.column_names else with_numbers(rows, LENGTH, pair_lengths(rows))


def pair_lengths(rows: Dataset) -> NDArray[np.int64]:
    """Count the tokens of every pair [N]: each of its prompts, with both completions for each prompt."""
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

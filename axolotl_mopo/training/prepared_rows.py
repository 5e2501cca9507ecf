"""Prepared rows: their lengths, and columns of numbers beside them.

A column joins the table below a shuffle or a split, so that no rows are written anew.
"""

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

LENGTH = "length"
"""The column by which the host groups rows of like length."""

_TOKENS = ["prompt_input_ids", "chosen_input_ids", "rejected_input_ids"]


def stored(rows: Dataset) -> tuple[Dataset, NDArray[np.int64] | None]:
    """The table below a selection and where each of the rows lies in it; the rows themselves and None without one."""
    indices = rows._indices
    if indices is None:
        return rows, None
    table = Dataset(rows.data, info=rows.info.copy(), split=rows.split, fingerprint=f"{rows._fingerprint}-stored")
    # Unsigned in the table, with which `datasets` cannot select rows that are neighbours.
    return table, indices.column(0).to_numpy().astype(np.int64)


def numbers(rows: Dataset, name: str) -> NDArray[Any]:
    """A column of numbers [N]."""
    table, selected = stored(rows)
    values = table.data.column(name).to_numpy()
    return values if selected is None else values[selected]


def with_numbers(rows: Dataset, name: str, values: NDArray[np.int64]) -> Dataset:
    """The rows with one more column.

    `datasets` copies selected rows before it adds one; here it joins the table below the selection.

    Args:
        rows: N rows.
        name: of the column, which they do not have.
        values: its whole numbers, [N].
    """
    table, selected = stored(rows)
    if selected is None or len(np.unique(selected)) < len(selected):  # a row that is there twice has two numbers
        return rows.add_column(name, values)
    column = np.zeros(len(table), np.int64)
    column[selected] = values
    return table.add_column(name, column).select(selected)


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

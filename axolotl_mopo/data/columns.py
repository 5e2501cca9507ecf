"""Columns of numbers beside prepared rows, without writing rows anew that a shuffle or a split has selected."""

from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray


def stored(rows: Dataset) -> tuple[Dataset, NDArray[np.int64] | None]:
    """The table below a selection and where each of the rows lies in it; the rows themselves and None without one."""
    indices = rows._indices
    if indices is None:
        return rows, None
    table = Dataset(rows.data, info=rows.info.copy(), split=rows.split, fingerprint=f"{rows._fingerprint}-stored")
    # Signed: `datasets` adds these to signed numbers to slice a file, and numpy makes floats of the two kinds.
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

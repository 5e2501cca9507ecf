"""Digests of the rows of a data set."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

_BATCH = 1000


def rows_digest(rows: Dataset, columns: Sequence[str]) -> str:
    """A digest of the values of some columns in the order of the rows, however Arrow stores them.

    Args:
        rows: the data set, with any number of shards, slices and selections.
        columns: names of columns of integers, strings, or lists of them.
    """
    hasher = hashlib.sha256(f"{len(rows)} {list(columns)}".encode())
    for batch in rows.select_columns(list(columns)).with_format("arrow").iter(_BATCH):
        for name in columns:
            for part in _canonical_parts(batch[name].combine_chunks()):
                hasher.update(part.tobytes())
    return hasher.hexdigest()[:32]


def _canonical_parts(values: pa.Array) -> Iterator[NDArray[Any]]:
    """Arrays whose bytes depend on the values only: lengths, with -1 for null, then the content.

    Arrow's own buffers also have padding, offsets of slices that do not start at 0, and arbitrary bytes at nulls.

    Raises:
        TypeError: if values have another type.
    """
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield _lengths(pc.list_value_length(values))
        yield from _canonical_parts(values.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield _lengths(pc.binary_length(values))
        texts = values.cast(pa.string()).drop_null()
        joined = pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), "")
        yield np.frombuffer(joined[0].as_buffer(), np.uint8)
    elif pa.types.is_integer(kind) or pa.types.is_null(kind):
        yield values.is_valid().to_numpy(zero_copy_only=False)
        yield values.cast(pa.int64()).drop_null().to_numpy()
    else:
        raise TypeError(f"values of type {kind} have no digest; use integers, strings, or lists of them")


def _lengths(lengths: pa.Array) -> NDArray[np.int64]:
    return lengths.cast(pa.int64()).fill_null(-1).to_numpy()

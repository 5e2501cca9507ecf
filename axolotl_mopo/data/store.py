"""Preference pairs in a file of this process, for the workers that turn them into token ids."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from axolotl_mopo.data.rows import PreferencePair

_SCHEMA = pa.schema([("row", pa.int64()), ("pair", pa.large_string())])
_BATCH = 1000


@dataclass
class PairStore:
    """Pairs by the number of the row that completed them; memory-mapped, so that workers share it."""

    path: Path

    @classmethod
    def write(cls, pairs: Iterator[tuple[int, PreferencePair]], folder: Path) -> "PairStore":
        """Put pairs, in ascending order of their rows, on a disk; they are gone when the process ends."""
        folder.mkdir(parents=True, exist_ok=True)
        home = Path(tempfile.mkdtemp(prefix="pairs-", dir=folder))
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        path = home / "pairs.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
            rows: list[int] = []
            texts: list[str] = []
            for row, pair in pairs:
                rows.append(row)
                texts.append(json.dumps(pair.to_row()))
                if len(rows) == _BATCH:
                    writer.write_batch(pa.record_batch([rows, texts], schema=_SCHEMA))
                    rows, texts = [], []
            if rows:
                writer.write_batch(pa.record_batch([rows, texts], schema=_SCHEMA))
        return cls(path)

    def between(self, first: int, last: int) -> list[tuple[int, PreferencePair]]:
        """The pairs of the rows from `first` to `last`, both included."""
        start, stop = np.searchsorted(self._rows, [first, last + 1])
        found = self._table[int(start) : int(stop)]
        return [
            (row, PreferencePair.from_row(json.loads(text)))
            for row, text in zip(found["row"], found["pair"], strict=True)
        ]

    @cached_property
    def _table(self) -> Dataset:
        return Dataset.from_file(str(self.path))

    @cached_property
    def _rows(self) -> np.ndarray:
        return self._table.with_format("numpy")["row"][:]

    def __getstate__(self) -> dict[str, Path]:
        """Only the path travels to a worker."""
        return {"path": self.path}

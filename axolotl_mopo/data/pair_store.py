"""Store preference pairs in a temporary file for the worker processes that turn them into token ids."""

import atexit
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset

from axolotl_mopo.data.rows import PreferencePair

_SCHEMA = pa.schema([("row", pa.int64()), ("pair", pa.large_string())])
_BATCH = 1000
_LOCK = "lock"


@dataclass
class PairStore:
    """Pairs by the number of the row that completed them; memory-mapped, so that workers share the memory."""

    path: Path

    @classmethod
    def write(cls, pairs: Iterator[tuple[int, PreferencePair]], folder: Path) -> "PairStore":
        """Write pairs, given in ascending order of their rows, to a file that is deleted when the process ends."""
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        home = _home(folder)
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
        """Return the pairs of the rows from `first` to `last`, both included."""
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
        """Send only the path to a worker."""
        return {"path": self.path}


def _home(folder: Path) -> Path:
    """Create a folder that is locked until this process ends, even if it is killed; it is renamed once it is locked."""
    home = Path(tempfile.mkdtemp(prefix="new-", dir=folder))
    with suppress(OSError):  # a file system without locks, where nothing is removed either
        fcntl.flock(os.open(home / _LOCK, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
    return home.rename(folder / home.name.replace("new-", "pairs-"))


def _sweep(folder: Path) -> None:
    """Remove the folders of processes that were killed."""
    for lock in folder.glob(f"pairs-*/{_LOCK}"):
        with suppress(OSError), lock.open("r+") as file:  # its process is running, or another one is removing it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)

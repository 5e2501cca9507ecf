"""Stores numbers for every row on disk, under the digest of everything that they depend on."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from axolotl.utils.logging import get_logger
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from axolotl_mopo.digests.weights import table_digest
from axolotl_mopo.files import Folder, read_file

LOG = get_logger("axolotl.mopo")

_DIGEST = "sha256"
"""Key of the digest in a file's metadata. A file without it was written by an older release and is computed again."""
_LARGEST = 1 << 32
_ROUND = 1.0
"""Seconds that the main process waits for a lock before it reports to the other processes."""


class TableCache:
    """A cache of tables [N, 2] with a number for the chosen and the rejected response of every row.

    Args:
        folder: folder of the files.
        accelerator: accelerator of the run; the main process reads and writes files, and sends tables to the others.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator

    def table(self, name: str, rows: int, compute: Callable[[], Tensor]) -> tuple[Tensor, bool]:
        """Return a table; if it is not in the cache, all processes compute it.

        Files are written atomically, and other runs wait for the run that computes the table.

        Args:
            name: digest of the content.
            rows: number of rows N.
            compute: computes the table; called on every process.

        Returns:
            The table on the CPU, and whether it was in the cache.
        """
        lock = FileLock(self.path(name).with_suffix(".lock"))
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._acquire(lock)
        try:
            found = self._read(name, rows) if self.accelerator.is_main_process else None
            (hit,) = broadcast_object_list([found is not None])
            if not hit:
                found = compute()
                if self.accelerator.is_main_process:
                    self._write(name, found)
        finally:
            lock.release()
        if hit and self.accelerator.num_processes > 1:
            values = torch.zeros(rows, 2) if found is None else found
            found = broadcast(values.to(self.accelerator.device))
        assert found is not None  # noqa: S101
        return found.cpu(), bool(hit)

    def _acquire(self, lock: FileLock) -> None:
        """Wait until the main process holds the lock, in rounds that are shorter than the timeout of collectives."""
        warned = False
        while True:
            (taken,) = broadcast_object_list([self.accelerator.is_main_process and _is_taken(lock)])
            if taken:
                return
            if self.accelerator.is_main_process and not warned:
                LOG.warning("Waiting for another run that computes the same table (lock file %s).", lock.lock_file)
                warned = True

    def path(self, name: str) -> Path:
        """Return the path of a table's file."""
        return self.folder / f"{name}.safetensors"

    def _read(self, name: str, rows: int) -> Tensor | None:
        Folder(self.folder).sweep(self.path(name).name)  # safe, since a process that writes holds the lock
        try:
            # Read the whole file before checking it, so that it cannot be replaced in between.
            values, recorded = _parse(read_file(self.path(name), _LARGEST))
        except (OSError, ValueError, SafetensorError):
            return None
        if values.shape != (rows, 2) or not values.isfinite().all() or recorded is None:
            return None
        if recorded != table_digest(name, values):
            LOG.warning("%s does not match its recorded digest; the table is computed again.", self.path(name))
            return None
        return values

    def _write(self, name: str, values: Tensor) -> None:
        content = save({"values": values.contiguous()}, {_DIGEST: table_digest(name, values)})
        self.path(name).unlink(missing_ok=True)  # a link, or anything else that is not a table, is replaced
        Folder(self.folder).write(self.path(name).name, content)


def _parse(content: bytes) -> tuple[Tensor, str | None]:
    """Return the values in a table's file, and the digest that was written with them."""
    tensors = load(content)
    if "values" not in tensors:
        raise ValueError("the file has no tensor `values`")
    size = int.from_bytes(content[:8], "little")
    return tensors["values"], (json.loads(content[8 : 8 + size]).get("__metadata__") or {}).get(_DIGEST)


def _is_taken(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=_ROUND)
    except Timeout:
        return False
    return True

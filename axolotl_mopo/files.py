"""Safe access to untrusted files: read only regular files; in a `Folder`, follow no links."""

import fcntl
import glob
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def is_hub_name(path: str) -> bool:
    """Whether a path has the form of a name on the model hub: `owner/name`, or `name` alone."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None


def read_file(path: Path, limit: int, *, follow_links: bool = True) -> bytes:
    """Read a regular file.

    Args:
        path: path of the file; a pipe or a device is refused before it can block.
        limit: largest size in bytes.
        follow_links: whether `path` itself may be a symbolic link, as in the model hub's cache.

    Raises:
        OSError: if the file cannot be read, is not a regular file, or is too large.
    """
    return _read(os.open(path, _flags(os.O_RDONLY, follow_links)), path, limit)


class Folder:
    """The folder of one command, in which nothing is read or written through a symbolic link.

    `write` is atomic: the content goes into a new file in the same folder, which then replaces the old file.

    Args:
        path: path of the folder; it may be a link itself, since the user gives it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Context manager that holds the lock of a file, which is created if it does not exist.

        Raises:
            BlockingIOError: if another process holds the lock.
            OSError: if the path exists and is not a regular file.
        """
        with self._parent(name, create=True) as (folder, leaf):
            self._refuse_others(folder, leaf)
            opened = os.open(leaf, _flags(os.O_RDWR | os.O_CREAT, False), 0o666, dir_fd=folder)
        with os.fdopen(opened, "rb"):
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a file; None if the file does not exist.

        Args:
            name: path relative to the folder, with `/`.
            limit: largest size in bytes.

        Raises:
            OSError: if the file is a link, is not a regular file, or is too large.
        """
        try:
            return _read(self._open(name), self.path / name, limit)
        except FileNotFoundError:
            return None

    def lines(self, name: str, limit: int) -> Iterator[bytes]:
        """The complete lines of a file without their line ends; none if the file does not exist.

        Args:
            name: path relative to the folder, with `/`.
            limit: largest size of a line in bytes.

        Raises:
            OSError: if the file is a link or is not a regular file, or a line is too long.
        """
        try:
            opened = self._open(name)
        except FileNotFoundError:
            return
        with os.fdopen(opened, "rb") as file:
            number = 0
            while line := file.readline(limit + 1):
                number += 1
                if line.endswith(b"\n"):
                    yield line[:-1]
                elif len(line) > limit:
                    raise OSError(f"{self.path / name}, line {number}, has more than {limit:,} bytes")

    def size(self, name: str) -> int:
        """The size of a file in bytes; 0 if the file does not exist.

        Raises:
            OSError: if the file is a link or is not a regular file.
        """
        try:
            with self._parent(name, create=False) as (folder, leaf):
                self._refuse_others(folder, leaf)
                return os.stat(leaf, dir_fd=folder, follow_symlinks=False).st_size
        except FileNotFoundError:
            return 0

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically; replace an existing one.

        Raises:
            OSError: if the path is a link or is not a regular file.
        """
        with self._parent(name, create=True) as (folder, leaf):
            self._refuse_others(folder, leaf)
            part = f".{leaf}.{secrets.token_hex(8)}.part"
            opened = os.open(part, _flags(os.O_WRONLY | os.O_CREAT | os.O_EXCL, False), 0o666, dir_fd=folder)
            try:
                with os.fdopen(opened, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, leaf, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                os.unlink(part, dir_fd=folder)
                raise

    def sweep(self, name: str) -> None:
        """Remove incomplete files that killed processes left; no process may be writing the file now."""
        for part in self.path.glob(f".{glob.escape(name)}.*.part"):
            part.unlink(missing_ok=True)

    def append(self, name: str, lines: bytes) -> None:
        """Append complete lines to a file; first cut off an incomplete line that a killed process left.

        Raises:
            OSError: if the path is a symbolic link, has a second hard link, or is not a regular file.
        """
        with self._parent(name, create=True) as (folder, leaf):
            self._refuse_others(folder, leaf)
            opened = os.open(leaf, _flags(os.O_RDWR | os.O_CREAT, False), 0o666, dir_fd=folder)
            with os.fdopen(opened, "r+b") as file:
                if os.fstat(file.fileno()).st_nlink > 1:
                    raise OSError(f"{self.path / name} has a second hard link, which would change too; copy the folder")
                if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                    file.seek(0, os.SEEK_END)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())

    def remove(self, name: str) -> None:
        """Remove a file, if it exists, and the folders around it that become empty."""
        with suppress(FileNotFoundError, NotADirectoryError), self._parent(name, create=False) as (folder, leaf):
            os.unlink(leaf, dir_fd=folder)
        for around in list(Path(name).parents)[:-1]:
            with suppress(OSError), self._parent(str(around), create=False) as (folder, leaf):
                os.rmdir(leaf, dir_fd=folder)

    def _open(self, name: str) -> int:
        with self._parent(name, create=False) as (folder, leaf):
            self._refuse_others(folder, leaf)
            return os.open(leaf, _flags(os.O_RDONLY, False), dir_fd=folder)

    @contextmanager
    def _parent(self, name: str, create: bool) -> Iterator[tuple[int, str]]:
        """Open the folder of a file one level at a time, without following links; yield it and the file's name."""
        *steps, leaf = Path(name).parts
        if Path(name).is_absolute() or ".." in steps or leaf == "..":
            raise OSError(f"{name} is not a path below {self.path}")
        if create:
            self.path.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for step in steps:
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(step, dir_fd=folder)
                self._refuse_others(folder, step, stat.S_ISDIR)
                inner = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            yield folder, leaf
        finally:
            os.close(folder)

    def _refuse_others(self, folder: int, name: str, wanted: Callable[[int], bool] = stat.S_ISREG) -> None:
        """Raise OSError if the name exists and is not a regular file (or not a folder)."""
        with suppress(FileNotFoundError):
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
            if not wanted(mode):
                kind = "a file" if wanted is stat.S_ISREG else "a folder"
                found = "a symbolic link" if stat.S_ISLNK(mode) else f"not {kind}"
                raise OSError(f"{name} in {self.path} is {found}; remove it, or put {kind} in its place")


def _flags(flags: int, follow_links: bool) -> int:
    return flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)


def _read(opened: int, path: Path, limit: int) -> bytes:
    with os.fdopen(opened, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        if status.st_size > limit:
            raise OSError(f"{path} has {status.st_size:,} bytes; the limit is {limit:,}")
        return file.read()

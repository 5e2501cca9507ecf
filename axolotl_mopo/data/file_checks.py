"""Find the local files of a data set and check whether they can be read.

Axolotl's loader reports a broken file without its name, or not at all.
"""

import codecs
import glob
import io
import json
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import infer_compression

from axolotl_mopo.digests import files_digest

_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_PROBED = 1 << 24
_LEAST_PROBED = 1 << 16
_PARQUET = b"PAR1"
_HIDDEN = re.compile(r"(^|/)(\.|__)")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BETWEEN_ROWS = re.compile(r"[\s,\[]*")


class _RepeatedKeyError(ValueError):
    """Raised for a JSON object that has a key twice."""


def data_digest(entry: Mapping[str, Any]) -> str:
    """Return a digest of the local files of a data-set entry; the same for all entries without local files.

    Raises:
        OSError: if a file cannot be read.
    """
    return files_digest(file for path in data_paths(entry) for file in files_at(path))


def data_paths(entry: Mapping[str, Any]) -> list[Path]:
    """Return the values of a data-set entry that may be a local file, a folder or a pattern of files.

    Axolotl looks for `data_files` in `path` if that is a folder. The file in `ratings` is included.
    """
    given = entry.get("data_files") or []
    folder = Path(entry["path"]) if Path(entry["path"]).is_dir() else Path()
    names = [given] if isinstance(given, str) else given
    ratings = [entry["ratings"]] if isinstance(entry.get("ratings"), str) else []
    return [Path(entry["path"]), *(folder / name for name in names), *map(Path, ratings)]


def files_at(path: Path) -> list[Path]:
    """List a file, all files of a folder and its subfolders, or the matches of a pattern with `*`, `?` or `[`."""
    if path.is_dir():
        return sorted(path.rglob("*"))
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def data_fault(path: Path, kind: str | None = None) -> str | None:
    """Describe why a file, a file of a folder or one that matches a pattern cannot be read; None if all can.

    At most 16 MiB of all files together or 64 KiB of each are read, whichever is more.

    Raises:
        OSError: if a file cannot be opened.
    """
    files = files_at(path)
    if path.is_dir():  # `datasets` does not read its hidden files
        files = _read_in_folder(path, files)
    limit = max(_PROBED // max(len(files), 1), _LEAST_PROBED)
    faults = ((file, file_fault(file, kind, limit)) for file in files)
    return next((f"{file} {fault}" for file, fault in faults if fault), None)


def _read_in_folder(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files of a folder that `datasets` reads: not hidden, in `data` if it exists, and of the main type."""
    kept = [file for file in files if not _HIDDEN.search(file.relative_to(folder).as_posix())]
    kept = [file for file in kept if (folder / "data") in file.parents] or kept
    kinds = Counter(kind for file in kept if file.is_file() and (kind := _kind(file)))
    most = max(kinds.values(), default=0)
    main = [kind for kind, count in kinds.items() if count == most]
    return [file for file in kept if not file.is_file() or (len(main) == 1 and _kind(file) == main[0])]


def _kind(path: Path) -> str | None:
    """Return the type of a file by its name, ignoring a compression suffix."""
    return _KINDS.get((path.with_suffix("") if infer_compression(path.name) else path).suffix.lower())


def file_fault(path: Path, kind: str | None = None, limit: int = _PROBED) -> str | None:
    """Describe why a file cannot be read as rows, judged by its beginning and end; None if no reason is found.

    Args:
        path: the file, compressed or not; a file that does not exist is not checked.
        kind: Axolotl's `ds_type`; by the file's name if None.
        limit: maximum number of bytes of its content to read.

    Raises:
        OSError: if it cannot be opened.
    """
    if not path.exists() or path.is_dir():
        return None
    if not stat.S_ISREG(path.stat().st_mode):
        return "is a pipe or a device, and not a file; write its content to a file first"
    compression = infer_compression(path.name)
    named = _kind(path)
    if named is None or (kind or named) != named:
        return None
    with path.open("rb") as file:
        try:
            content = fsspec.compression.compr[compression](file, mode="rb") if compression else file
            head, whole = content.read(limit), not content.read(1)
        except Exception as error:  # every compression format raises its own errors
            if compression is None:
                raise
            return f"is not a {path.suffix} file, or is incomplete ({error}); copy or download it again"
        file.seek(-min(file.seek(0, io.SEEK_END), len(_PARQUET)), io.SEEK_END)
        end = file.read()
    if not head.strip():
        return "is empty"
    if named == "parquet":
        whole_parquet = compression or head[:4] == end == _PARQUET
        return None if whole_parquet else "is not a Parquet file, or is incomplete; copy or download it again"
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=whole)
    except UnicodeDecodeError as error:
        line = head[: error.start].count(b"\n") + 1
        return f"is not UTF-8 from line {line} on; convert it, for example with `iconv -t UTF-8`"
    if named == "csv":
        return None if len(text.strip().splitlines()) > 1 else "has a header but no rows"
    return _json_fault(text, whole)


def _json_fault(text: str, whole: bool) -> str | None:
    try:
        values = _loads(text, strict=False)  # Axolotl accepts line breaks within the strings of an array
    except _RepeatedKeyError as error:
        return f"has {error} in line {_line_of_repeated_key(text)}; rename or remove one of them"
    except ValueError as error:
        if text.lstrip().startswith("["):
            return f"is not valid JSON: {error}; it may be cut off; fix it, or copy it again" if whole else None
        return _line_fault(text, whole)
    if values == []:
        return "has no rows"
    if not isinstance(values, list):
        values = [values]
    odd = [(index, value) for index, value in enumerate(values) if not isinstance(value, dict)]
    if odd:
        return f"has {odd[0][1]!r:.60} instead of a JSON object in row {odd[0][0]}"
    if _SURROGATE.search(text):
        for index, value in enumerate(values):
            if surrogate := _lone_surrogate(value):
                return f"contains {surrogate} in row {index}, {_NOT_UNICODE}"
    return None


def _line_fault(text: str, whole: bool) -> str | None:
    lines = text.split("\n")
    for number, line in enumerate(lines if whole else lines[:-1], 1):
        if not line.strip():
            continue
        try:
            value = _loads(line)
        except _RepeatedKeyError as error:
            return f"has {error} in line {number}; rename or remove one of them"
        except ValueError as error:
            if number == 1 and not whole:
                return None  # may be a single value of many lines
            return f"is not valid JSON in line {number}: {error}; fix or remove the line"
        if not isinstance(value, dict):
            return f"has {value!r:.60} instead of a JSON object in line {number}"
        if _SURROGATE.search(line) and (surrogate := _lone_surrogate(value)):
            return f"contains {surrogate} in line {number}, {_NOT_UNICODE}"
    return None


_NOT_UNICODE = "which is not valid Unicode text; remove it, or replace it with '\\ufffd'"


def _lone_surrogate(value: Any) -> str | None:
    """Find a lone surrogate, which `datasets` removes from the text or rejects without naming the row."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"the lone surrogate {error.object[error.start]!a}"
    return None


def _loads(text: str, strict: bool = True) -> Any:
    return json.loads(text, strict=strict, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKeyError(f"the key {repeated!r:.60} twice in one JSON object")
    return unique


def _line_of_repeated_key(text: str) -> int:
    """Return the line where the first row with a repeated key begins, in a list of rows or a single row."""
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_unique)
    start = end = 0
    try:
        while between := _BETWEEN_ROWS.match(text, end):
            start = between.end()
            _, end = decoder.raw_decode(text, start)
    except _RepeatedKeyError:
        pass
    return text.count("\n", 0, start) + 1

"""The local files of a data set: which there are, and what is wrong with them.

Axolotl's loader would report a broken file without its name, or not at all.
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
    """A JSON object that has a key twice."""


def data_digest(entry: Mapping[str, Any]) -> str:
    """A name made of the local files of a data-set entry; the same for all entries without any.

    Raises:
        OSError: where a file cannot be read.
    """
    return files_digest(file for path in data_paths(entry) for file in files_at(path))


def data_paths(entry: Mapping[str, Any]) -> list[Path]:
    """Whatever a data-set entry says that may be a local file, a folder or a pattern of files.

    Axolotl looks for `data_files` within `path`, where that is a folder. Ratings that rows are joined with count too.
    """
    given = entry.get("data_files") or []
    folder = Path(entry["path"]) if Path(entry["path"]).is_dir() else Path()
    names = [given] if isinstance(given, str) else given
    ratings = [entry["ratings"]] if isinstance(entry.get("ratings"), str) else []
    return [Path(entry["path"]), *(folder / name for name in names), *map(Path, ratings)]


def files_at(path: Path) -> list[Path]:
    """A file, those of a folder and the folders below it, or those that a pattern with `*`, `?` or `[` matches."""
    if path.is_dir():
        return sorted(path.rglob("*"))
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def data_fault(path: Path, kind: str | None = None) -> str | None:
    """What keeps a file, a folder's files or those that match a pattern from being read, with the file's name.

    All files together are probed no further than 16 MiB or 64 KiB each, whichever is more.

    Raises:
        OSError: where one cannot be read at all.
    """
    files = files_at(path)
    if path.is_dir():  # the hidden files in it are not read
        files = _read_in_folder(path, files)
    limit = max(_PROBED // max(len(files), 1), _LEAST_PROBED)
    faults = ((file, file_fault(file, kind, limit)) for file in files)
    return next((f"{file} {fault}" for file, fault in faults if fault), None)


def _read_in_folder(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Those files of a folder that `datasets` reads: not hidden, in `data` where that is there, of the main kind."""
    kept = [file for file in files if not _HIDDEN.search(file.relative_to(folder).as_posix())]
    kept = [file for file in kept if (folder / "data") in file.parents] or kept
    kinds = Counter(kind for file in kept if file.is_file() and (kind := _kind(file)))
    most = max(kinds.values(), default=0)
    main = [kind for kind, count in kinds.items() if count == most]
    return [file for file in kept if not file.is_file() or (len(main) == 1 and _kind(file) == main[0])]


def _kind(path: Path) -> str | None:
    """How a file is read, by its name."""
    return _KINDS.get((path.with_suffix("") if infer_compression(path.name) else path).suffix.lower())


def file_fault(path: Path, kind: str | None = None, limit: int = _PROBED) -> str | None:
    """What keeps a file from being read as rows, as far as its beginning and its end tell; None where nothing does.

    Args:
        path: of the file, compressed or not; nothing is known of one that does not exist.
        kind: Axolotl's `ds_type`; what the file's name says where it is None.
        limit: how many bytes of its content are read.

    Raises:
        OSError: where it cannot be read at all.
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
        except Exception as error:  # every kind of compression has errors of its own
            if compression is None:
                raise
            return f"is not a {path.suffix} file, or only a part of one ({error}); copy or download it again"
        file.seek(-min(file.seek(0, io.SEEK_END), len(_PARQUET)), io.SEEK_END)
        end = file.read()
    if not head.strip():
        return "is empty"
    if named == "parquet":
        whole_parquet = compression or head[:4] == end == _PARQUET
        return None if whole_parquet else "is no Parquet file, or only a part of one; fetch it again"
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head, final=whole)
    except UnicodeDecodeError as error:
        line = head[: error.start].count(b"\n") + 1
        return f"is not UTF-8, from line {line} on; convert it, for instance with `iconv -t UTF-8`"
    if named == "csv":
        return None if len(text.strip().splitlines()) > 1 else "holds a header and no rows"
    return _json_fault(text, whole)


def _json_fault(text: str, whole: bool) -> str | None:
    try:
        values = _loads(text, strict=False)  # the host takes line breaks within the strings of an array
    except _RepeatedKeyError as error:
        return f"has {error} in line {_line_of_repeated_key(text)}; rename or remove one of them"
    except ValueError as error:
        if text.lstrip().startswith("["):
            return f"is no JSON: {error}; it may have been cut off" if whole else None
        return _line_fault(text, whole)
    if values == []:
        return "holds no rows"
    if not isinstance(values, list):
        values = [values]
    odd = [(index, value) for index, value in enumerate(values) if not isinstance(value, dict)]
    if odd:
        return f"holds, as row {odd[0][0]}, no JSON object but {odd[0][1]!r:.60}"
    if _SURROGATE.search(text):
        for index, value in enumerate(values):
            if surrogate := _lone_surrogate(value):
                return f"holds {surrogate} in row {index}, {_NO_TEXT}"
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
                return None  # a single value of many lines, perhaps
            return f"is no JSON in line {number}: {error}; fix the line or take it out"
        if not isinstance(value, dict):
            return f"holds, in line {number}, no JSON object but {value!r:.60}"
        if _SURROGATE.search(line) and (surrogate := _lone_surrogate(value)):
            return f"holds {surrogate} in line {number}, {_NO_TEXT}"
    return None


_NO_TEXT = "which is not valid Unicode text; remove it, or replace it with '\\ufffd'"


def _lone_surrogate(value: Any) -> str | None:
    """What `datasets` refuses without a word of where, or leaves out of the text."""
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
    """The line where the first row with a repeated key begins, in a list of rows or in a single one."""
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_unique)
    start = end = 0
    try:
        while between := _BETWEEN_ROWS.match(text, end):
            start = between.end()
            _, end = decoder.raw_decode(text, start)
    except _RepeatedKeyError:
        pass
    return text.count("\n", 0, start) + 1

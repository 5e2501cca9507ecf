"""Faults of local data files, which the host's loader would report without the file's name or not at all."""

import codecs
import json
from pathlib import Path

_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_PROBED = 1 << 24
_PARQUET = b"PAR1"


def file_fault(path: Path, kind: str | None = None) -> str | None:
    """What keeps a file from being read as rows, as far as its first 16 MiB and its end tell; None where nothing does.

    Args:
        path: of the file; nothing is known of one that does not exist.
        kind: the host's `ds_type`; what the file's name says where it is None.

    Raises:
        OSError: where it cannot be read at all.
    """
    named = _KINDS.get(path.suffix.lower())
    if named is None or (kind or named) != named or not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(_PROBED)
        whole = not file.read(1)
        file.seek(-min(len(head), len(_PARQUET)), 2)
        end = file.read()
    if not head.strip():
        return "is empty"
    if named == "parquet":
        return None if head[:4] == end == _PARQUET else "is no Parquet file, or only a part of one; fetch it again"
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
        values = json.loads(text, strict=False)  # the host takes line breaks within the strings of an array
    except ValueError as error:
        if text.lstrip().startswith("["):
            return f"is no JSON: {error}; it may have been cut off" if whole else None
        return _line_fault(text, whole)
    if values == []:
        return "holds no rows"
    if not isinstance(values, list):
        values = [values]
    odd = [(index, value) for index, value in enumerate(values) if not isinstance(value, dict)]
    return f"holds, as row {odd[0][0]}, no JSON object but {odd[0][1]!r:.60}" if odd else None


def _line_fault(text: str, whole: bool) -> str | None:
    lines = text.split("\n")
    for number, line in enumerate(lines if whole else lines[:-1], 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == 1 and not whole:
                return None  # a single value of many lines, perhaps
            return f"is no JSON in line {number}: {error}; mend the line or take it out"
        if not isinstance(value, dict):
            return f"holds, in line {number}, no JSON object but {value!r:.60}"
    return None

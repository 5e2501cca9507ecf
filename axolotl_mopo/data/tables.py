"""Load a local file, a folder or a data set of the hub as a table of raw rows."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.table import CastError

from axolotl_mopo.data.file_checks import data_fault
from axolotl_mopo.errors import DataError

_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_GENERIC = "An error occurred while generating the dataset"
_MAX_REASON = 300


def load_table(
    source: str,
    *,
    split: str = "train",
    name: str | None = None,
    data_files: Sequence[str] | None = None,
    revision: str | None = None,
) -> Dataset:
    """Load a local file, a folder (of files, or written by `save_to_disk`) or a data set of the hub.

    The path of an existing file is not read as a pattern, even if it contains `*` or `[`.

    Raises:
        DataError: if it cannot be loaded; the error gives the reason.
    """
    path = Path(source)
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if (path.is_file() or saved) and (name or data_files or revision):
        raise DataError(
            f"{source} is a file or a saved data set, which has no name, data files or revision; remove these options"
        )
    folder = path if path.is_dir() else Path()
    if not saved:
        _check_files([folder / file for file in data_files or ()] or [path])
    try:
        if path.is_file():
            kind = next((_KINDS[suffix] for suffix in reversed(path.suffixes) if suffix in _KINDS), None)
            if kind is None:
                raise DataError(f"{source}: unknown file type; known types are {', '.join(_KINDS)}, compressed or not")
            return load_dataset(kind, data_files=glob.escape(source), split=split)
        if saved:
            return _saved_split(load_from_disk(source), source, split)
        files = [_literal(folder, file) for file in data_files] if data_files else None
        return load_dataset(source, name, data_files=files, split=split, revision=revision)
    except DataError:
        raise
    except Exception as error:
        hint = "the split, and that its files are complete" if path.exists() else "the path, or the name on the hub"
        raise DataError(f"{source}, split {split}, cannot be loaded: {_reason(error)}; check {hint}") from error


def _check_files(paths: Sequence[Path]) -> None:
    """Check local files for faults that `datasets` reports without the file's name, or not at all.

    Raises:
        DataError: if a file cannot be read; it names the file.
    """
    for path in paths:
        try:
            fault = data_fault(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        if fault:
            raise DataError(fault)


def _literal(folder: Path, name: str) -> str:
    """Escape the glob characters of a name in `data_files` if a file has exactly this name."""
    return glob.escape(name) if (folder / name).exists() else name


def _saved_split(saved: Dataset | DatasetDict, source: str, split: str) -> Dataset:
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise DataError(
            f"{source} has no split {split}; it was written by save_to_disk and has {', '.join(splits)}; parts of a "
            "split cannot be selected"
        )
    return splits[split]


def _reason(error: BaseException) -> str:
    """Find the reason of an error that `datasets` wraps in uninformative ones."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, CastError):
            one, other = (", ".join(names) for names in (cause.table_column_names, cause.requested_column_names))
            return (
                f"its files do not have the same columns: one has {one}, another {other}; load only "
                "files with the same columns, with `data_files` (--data-files)"
            )
    reasons = (str(cause).strip() for cause in causes if str(cause).strip() not in ("", _GENERIC))
    reason = next(reasons, None)
    if reason is None:
        return f"it has no readable rows ({type(causes[-1]).__name__})"
    return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]} ..."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

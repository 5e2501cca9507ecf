"""Names made of the content of local files, which may change while their path stays."""

import glob
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges", "spiece")
"""How the names of a tokenizer's files begin."""


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


def tokenizer_digest(cfg: Mapping[str, Any]) -> str:
    """A name made of the files of a tokenizer in a local folder, and of the tokens that the YAML adds.

    The host's own name of prepared rows has the folder's path, and what other keys say of the tokenizer.

    Raises:
        OSError: where a file cannot be read.
    """
    folder = cfg.get("tokenizer_config") or cfg.get("base_model_config") or cfg.get("base_model")
    paths = Path(folder).glob("*") if isinstance(folder, str) else []
    digest = files_digest(path for path in paths if path.name.startswith(TOKENIZER_FILES))
    return hashlib.sha256(f"{digest} {cfg.get('tokens')}".encode()).hexdigest()[:32]


def files_digest(paths: Iterable[Path]) -> str:
    """A name made of the names and the content of files; folders among them do not count.

    Raises:
        OSError: where a file cannot be read.
    """
    hasher = hashlib.sha256()
    for path in sorted(set(paths)):
        if path.is_file():
            with path.open("rb") as file:
                hasher.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return hasher.hexdigest()[:32]


def files_at(path: Path) -> list[Path]:
    """A file, those of a folder and the folders below it, or those that a pattern with `*`, `?` or `[` matches."""
    if path.is_dir():
        return sorted(path.rglob("*"))
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))

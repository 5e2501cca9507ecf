"""Names made of the content of local files, which may change while their path stays."""

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
    return files_digest(path for name in data_names(entry) for path in _files(Path(name)))


def data_names(entry: Mapping[str, Any]) -> list[str]:
    """Whatever a data-set entry says that may be a local file or folder."""
    given = entry.get("data_files") or []
    return [entry["path"], *([given] if isinstance(given, str) else given)]


def tokenizer_digest(cfg: Mapping[str, Any]) -> str:
    """A name made of the files of a tokenizer in a local folder; the same for all tokenizers of the hub.

    Raises:
        OSError: where a file cannot be read.
    """
    folder = cfg.get("tokenizer_config") or cfg.get("base_model_config") or cfg.get("base_model")
    if not isinstance(folder, str):
        return files_digest([])
    return files_digest(path for path in Path(folder).glob("*") if path.name.startswith(TOKENIZER_FILES))


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


def _files(path: Path) -> Iterable[Path]:
    return path.rglob("*") if path.is_dir() else [path]

"""Names made of the content of local files, which may change while their path stays."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = ("tokenizer*", "chat_template*", "special_tokens*", "added_tokens*", "vocab*", "merges*", "spiece*")


def data_digest(entry: Mapping[str, Any]) -> str:
    """A name made of the local files of a data-set entry; the same for all entries without any.

    Raises:
        OSError: where a file cannot be read.
    """
    given = entry.get("data_files") or []
    names = (entry["path"], *([given] if isinstance(given, str) else given))
    return _digest(path for name in names for path in _files(Path(str(name))))


def tokenizer_digest(cfg: Mapping[str, Any]) -> str:
    """A name made of the files of a tokenizer in a local folder; the same for all tokenizers of the hub.

    Raises:
        OSError: where a file cannot be read.
    """
    folder = cfg.get("tokenizer_config") or cfg.get("base_model_config") or cfg.get("base_model")
    if not isinstance(folder, str):
        return _digest([])
    return _digest(path for pattern in _TOKENIZER_FILES for path in Path(folder).glob(pattern) if path.is_file())


def _files(path: Path) -> Iterable[Path]:
    if path.is_dir():
        return [child for child in path.rglob("*") if child.is_file()]
    return [path] if path.is_file() else []


def _digest(paths: Iterable[Path]) -> str:
    hasher = hashlib.sha256()
    for path in sorted(set(paths)):
        with path.open("rb") as file:
            hasher.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return hasher.hexdigest()[:16]

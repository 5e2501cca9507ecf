"""Content hashes, which key caches and prepared rows.

This module imports neither torch nor datasets; `rows` has the digests of data sets, `weights` those of models.
"""

import hashlib
import inspect
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from axolotl_mopo.errors import ConfigError

TOKENIZER_FILES = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges", "spiece")
"""Prefixes of the names of a tokenizer's files."""
_CONFIGS = ("config.json", "adapter_config.json")


def digest(content: Any) -> str:
    """A digest of a JSON-like value."""
    return text_digest(json.dumps(content, sort_keys=True))


def text_digest(text: str) -> str:
    """A digest of a text, which may contain lone surrogates."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fingerprint(value: Any) -> int:
    """A 63-bit digest of a JSON-like value as a number, the same on every machine; dates are hashed as text."""
    content = json.dumps(value, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def token_ids_digest(responses: Iterable[Sequence[int]]) -> str:
    """A digest of sequences of token ids."""
    hasher = hashlib.blake2b(digest_size=8)
    for numbers in responses:
        hasher.update(array("q", numbers).tobytes())
    return hasher.hexdigest()


def source_digest(function: Any, settings: str) -> str:
    """A digest of settings and of the source code of a function's module.

    Raises:
        TypeError, OSError: if the function has no Python source.
    """
    source = inspect.getsource(inspect.getmodule(function) or function)
    return text_digest(f"{settings}\n{source}")


def files_digest(paths: Iterable[Path]) -> str:
    """A digest of the names and the content of files; folders are ignored.

    Raises:
        OSError: if a file cannot be read.
    """
    hasher = hashlib.sha256()
    for path in sorted(set(paths)):
        if path.is_file():
            with path.open("rb") as file:
                hasher.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return hasher.hexdigest()[:32]


def tokenizer_digest(cfg: Mapping[str, Any]) -> str:
    """A digest of the files of a tokenizer in a local folder and of the tokens that the YAML adds.

    Axolotl's own hash of prepared rows covers the path of the folder and the other keys of the tokenizer.

    Raises:
        OSError: if a file cannot be read.
    """
    folder = cfg.get("tokenizer_config") or cfg.get("base_model_config") or cfg.get("base_model")
    paths = Path(folder).glob("*") if isinstance(folder, str) else []
    files = files_digest(path for path in paths if path.name.startswith(TOKENIZER_FILES))
    return text_digest(f"{files} {cfg.get('tokens')}")


def model_digest(path: str) -> str:
    """A digest of a model's files, or of its commit on the model hub.

    Raises:
        ConfigError: if the model is neither on this machine nor on the hub.
    """
    if Path(path).is_dir():
        return model_files_digest(Path(path))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ConfigError(f"the model {path} cannot be loaded: {error}") from None
    return digest([path, getattr(config, "_commit_hash", None)])


def model_files_digest(folder: Path) -> str:
    """A digest of the weights, the configs and the tokenizer in a model's folder."""
    return files_digest(path for path in folder.iterdir() if _is_of_model(path))


def _is_of_model(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin") or path.name in _CONFIGS or path.name.startswith(TOKENIZER_FILES)

"""Choose the rows that test a configuration: the first of its own data or of a sample, or made-up rows."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from axolotl_mopo.commands.synthetic_rows import made_up_rows, rows_of_axolotl
from axolotl_mopo.config import MethodConfig
from axolotl_mopo.data.entries import PREFIX
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.tables import load_table
from axolotl_mopo.errors import ConfigError, DataError

PAIRS = 12
"""Number of pairs to train on."""
_ROWS = 2000
"""Number of rows to search for them."""
_STREAMED = 64


def own_rows(entry: Mapping[str, Any]) -> tuple[Dataset, str] | None:
    """The first rows of an entry's own data, and their source; None if the data is not available.

    Raises:
        DataError: if a local data set cannot be loaded.
    """
    path = str(entry.get("path"))
    names = entry.get("data_files")
    files = [names] if isinstance(names, str) else names
    split = str(entry.get("split") or "train")
    if Path(path).exists():
        return load_table(path, split=split, name=entry.get("name"), data_files=files), path
    if not hub_has(path, "dataset"):
        return None
    split = split.split("[")[0]
    try:
        stream = load_dataset(path, entry.get("name"), data_files=files, split=split, streaming=True)
        return Dataset.from_list(list(stream.take(_STREAMED))), f"{path}, of the hub"
    except Exception:  # any error of a library, such as no network, a loading script or an unknown split
        return None


def hub_has(name: str, kind: str) -> bool:
    """Whether the hub is reachable and has a model or a data set of this name."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON") or name.count("/") > 1:
        return False
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except Exception:  # offline, unknown or private: not available
        return False
    return True


def sample_rows(path: str) -> Dataset:
    """Load a sample that the user names.

    Raises:
        DataError: if it does not exist or cannot be read.
    """
    if not Path(path).exists():
        raise DataError(
            f"--data: there is no file or folder {path} (the working folder is {Path.cwd()}); check the path"
        )
    return load_table(path)


def few(table: Dataset, spec: DataSpec | None) -> Dataset:
    """The first rows that give enough pairs, or a few rows if `spec` is None.

    Bad rows among them stay, so that training reports them.
    """
    rows = table.select(range(min(len(table), _ROWS)))
    if spec is None:
        return rows.select(range(min(len(rows), 2 * PAIRS)))
    last, made = len(rows) - 1, 0
    try:
        for number, _ in PairReader(rows, spec).pairs():
            made += 1
            if made >= PAIRS:
                last = number
                break
    except DataError:
        last = min(last, 4 * PAIRS)
    return rows.select(range(last + 1))


def made_up(entry: Mapping[str, Any], block: MethodConfig | None) -> tuple[Dataset, Dataset | None]:
    """Make up rows in the format of an entry, and rated responses if it has `ratings`.

    Raises:
        ConfigError: if the format belongs to another package.
    """
    kind = entry.get("type")
    if block is None or not isinstance(kind, str) or not kind.startswith(PREFIX):
        return Dataset.from_list(rows_of_axolotl(entry, PAIRS)), None
    name = kind.removeprefix(PREFIX)
    scales = _scales(name, entry, block)
    rows = made_up_rows(name, entry, scales, PAIRS)
    if rows is None:
        raise ConfigError(f"no rows can be made up for `type: {kind}`; give a sample with --data")
    ratings = None
    if entry.get("ratings"):
        rated = made_up_rows("helpsteer", {}, scales, PAIRS)
        ratings = Dataset.from_list(rated or [])
    return Dataset.from_list(rows), ratings


def _scales(name: str, entry: Mapping[str, Any], block: MethodConfig) -> dict[str, tuple[float, float]]:
    """The scores that rows need, each with its scale: the objectives, and what orders the pairs."""
    known = FORMATS[name].scales if name in FORMATS else {}
    settings = block.row_settings
    names, scale = settings.score_names, settings.score_range or (0.0, 4.0)
    if FORMATS[name].objectives is None:
        given = entry.get("objective") or block.ordering[1]
        names = [*([given] if isinstance(given, str) else given), *names]
    own = tuple(entry["score_scale"]) if entry.get("score_scale") else scale
    return {each: known.get(each, own) for each in dict.fromkeys(names)}

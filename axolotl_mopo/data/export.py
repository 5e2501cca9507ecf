"""Write a data set as a file of canonical pairs, and summarise how its rows were used."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.rows import PreferencePair, is_text
from axolotl_mopo.data.stats import RowStats
from axolotl_mopo.errors import DataError

_BATCH = 1000


def export_pairs(reader: PairReader, output: Path, attributes: Sequence[str] | None) -> None:
    """Write the pairs of a data set to a file, which appears only when it is complete.

    Args:
        reader: the reader of the data set.
        output: a `.jsonl` or `.parquet` file.
        attributes: the scores to keep; all if None.

    Raises:
        DataError: for a bad row, or if there are no pairs or no pair has one of the attributes.
    """
    if output.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{output}: unknown file type; use .jsonl or .parquet")
    if output.is_dir():
        raise DataError(f"{output} is a folder; name a file")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pairs-", dir=output.parent) as aside:
        rows, table = Path(aside, "rows.jsonl"), Path(aside, "rows.parquet")
        with rows.open("w", encoding="utf-8") as file:
            for _, pair in reader.pairs():
                file.write(json.dumps(_keep(pair, attributes).to_row(), ensure_ascii=False) + "\n")
        _check(reader, attributes)
        if output.suffix == ".parquet":
            _to_parquet(rows, table, attributes or reader.stats.score_names)
        (rows if output.suffix == ".jsonl" else table).replace(output)


def summary(stats: RowStats, names: Sequence[str]) -> str:
    """Describe the counts, and how often the orders of the label and of the scores agree."""
    lines = stats.lines()
    if names:
        heads = ["label", *names]
        width = max(map(len, heads)) + 2
        lines += [
            "",
            "How often two orders agree, in percent of the pairs that are tied in neither (100: no conflict, 50: no",
            "relation):",
            "".join(head.rjust(width) for head in ["", *heads]),
        ]
        for head, shares in zip(heads, stats.agreement(names), strict=True):
            cells = ["-" if np.isnan(share) else f"{100 * share:.1f}" for share in shares]
            lines.append("".join(cell.rjust(width) for cell in [head, *cells]))
    return "\n".join(lines)


def _keep(pair: PreferencePair, attributes: Sequence[str] | None) -> PreferencePair:
    if attributes is None:
        return pair
    chosen, rejected = (
        replace(side, scores={name: side.scores.get(name) for name in attributes})
        for side in (pair.chosen, pair.rejected)
    )
    return replace(pair, chosen=chosen, rejected=rejected)


def _check(reader: PairReader, attributes: Sequence[str] | None) -> None:
    stats = reader.stats
    if not stats.pairs:
        raise DataError(f"{reader.spec.where}: no pair could be made from it: {'; '.join(stats.lines())}")
    if absent := [name for name in attributes or () if name not in stats.score_names]:
        raise DataError(
            f"{reader.spec.where}: no pair has a score of {', '.join(absent)}; its scores are "
            f"{', '.join(stats.score_names) or 'none'}"
        )


def _to_parquet(rows: Path, output: Path, names: Sequence[str]) -> None:
    """Write canonical rows as Parquet; conversations that are more than texts are written as JSON text."""
    with rows.open(encoding="utf-8") as file:
        plain = all(_is_plain(json.loads(line)) for line in file)
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns: list[tuple[str, Any]] = [
        ("prompt", pa.list_(message) if plain else pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
    ]
    if not plain:
        columns += [("tools", pa.string()), ("chat_template_kwargs", pa.string())]
    if names:
        scores = pa.struct([(name, pa.float64()) for name in names])
        columns += [("chosen_scores", scores), ("rejected_scores", scores)]
    schema = pa.schema(columns)
    with rows.open(encoding="utf-8") as file, pq.ParquetWriter(output, schema) as writer:
        pairs = (json.loads(line) for line in file)
        while batch := list(islice(pairs, _BATCH)):
            table = batch if plain else [_with_json_text(row) for row in batch]
            writer.write_table(pa.Table.from_pylist(table, schema=schema))


def _is_plain(row: dict[str, Any]) -> bool:
    texts = isinstance(row["chosen"], str) and isinstance(row["rejected"], str)
    return texts and not row.keys() & {"tools", "chat_template_kwargs"} and all(map(is_text, row["prompt"]))


def _with_json_text(row: dict[str, Any]) -> dict[str, Any]:
    names = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
    texts = {name: row[name] for name in names if name in row and not isinstance(row[name], str)}
    return row | {name: json.dumps(value, ensure_ascii=False) for name, value in texts.items()}

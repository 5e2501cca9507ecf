"""The strategies that a data set's `type:` names: turn Axolotl's rows into token ids."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.logging import get_logger
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedTokenizerBase

from axolotl_mopo.config import RowSettings
from axolotl_mopo.config.directives import Directive
from axolotl_mopo.data.conversations import with_directive
from axolotl_mopo.data.entries import PREFIX
from axolotl_mopo.data.formats import FORMATS
from axolotl_mopo.data.pair_store import PairStore
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.rows import Message, PreferencePair, rescale
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.tokenizing import ChatRenderer, ControlTokenCount, tokenize
from axolotl_mopo.data.truncation import Render, TokenizedPair, fit
from axolotl_mopo.errors import DataError, RowError

LOG = get_logger("axolotl.mopo")

Columns = dict[str, list[Any]]
Strategy = tuple[Callable[..., Columns], dict[str, Any]]


_COLUMNS = {
    "prompt": Value("string"),
    "chosen": Value("string"),
    "rejected": Value("string"),
    "prompt_input_ids": List(List(Value("int32"))),
    "chosen_input_ids": List(Value("int32")),
    "rejected_input_ids": List(Value("int32")),
    "prompt_key": Value("int64"),
    "cut_prompt_tokens": Value("int32"),
    "cut_completion_tokens": Value("int32"),
}
_MARGINS = {f"{side}_margin_rewards": List(Value("float64")) for side in ("chosen", "rejected")}
_TEXTS = {"messages": Value("string"), "chosen_text": Value("string"), "rejected_text": Value("string")}


def find_strategy(name: str) -> Callable[..., Strategy]:
    """Return the strategy that a data set's type names, bound to the settings whose key follows the `@`.

    Raises:
        AttributeError: if there is no such strategy.
    """
    strategy, _, key = name.partition("@")
    if strategy not in FORMATS:
        raise AttributeError(f"module 'axolotl_mopo' has no attribute {name!r}")
    return partial(_strategy, key=key) if key else _strategy


def _strategy(cfg: Mapping[str, Any], dataset_idx: int | None = None, *, key: str, **_: Any) -> Strategy:
    """Read a data set as pairs, and return the function with which Axolotl turns them into token ids.

    The pairs are made here, in one pass, and stored by the number of the row that completed them. Axolotl's map over
    the rows then fetches the pairs of its rows, so they do not depend on the number of processes or the batch size.

    Args:
        cfg: Axolotl's configuration.
        dataset_idx: Axolotl's index of the data set. Not used: it is the same for train and test data, unlike `key`.
        key: the key of the data set's settings in `cfg["mopo_data"]`.

    Returns:
        The transform of a batch of rows, and the arguments of the `datasets.map` that applies it. The new rows have:
        the token ids `prompt_input_ids` (a list for each of the D prompts), `chosen_input_ids`, `rejected_input_ids`;
        MODPO's margin rewards that need no model (`chosen_margin_rewards`, `rejected_margin_rewards`); the texts, if a
        margin reads them (`messages`, `chosen_text`, `rejected_text`); the strings for Axolotl's length filter
        (`prompt`, the longest one, `chosen`, `rejected`); and for logging `prompt_key`, `cut_prompt_tokens`,
        `cut_completion_tokens`.
    """
    spec = DataSpec.model_validate(dict(cfg["mopo_data"][key]))
    try:
        transform = partial(_transform, store=_read(cfg, spec), spec=spec, sequence_len=cfg["sequence_len"])
    except DataError as error:
        # Axolotl turns an error raised here into a warning; an error raised in its map stops the run.
        transform = partial(_raise_data_error, message=str(error))
    arguments = {"batched": True, "with_indices": True, "remove_columns": "__all__"}
    return transform, {**arguments, "features": Features(_columns(spec.settings))}


def _columns(settings: RowSettings) -> dict[str, Any]:
    return _COLUMNS | ({} if settings.margins is None else _MARGINS) | (_TEXTS if settings.texts else {})


def _read(cfg: Mapping[str, Any], spec: DataSpec) -> PairStore:
    tokenizer = load_tokenizer(cfg)
    try:
        check = ChatRenderer(tokenizer).check_roles
    except DataError as error:
        raise DataError(f"{spec.where}: {error}") from None
    reader = PairReader(raw_table(cfg, spec), spec, check)
    folder = Path(cfg.get("dataset_prepared_path") or DEFAULT_DATASET_PREPARED_PATH)
    control_tokens = ControlTokenCount(tokenizer)
    store = PairStore.write(control_tokens.watch(reader.pairs()), folder)
    stats = reader.stats
    LOG.info("%s: %s.", spec.where, "; ".join(stats.lines()))
    if not stats.pairs:
        hint = ", or set another `objective`" if hasattr(spec.options, "objective") else ""
        raise DataError(f"{spec.where}: no pair could be made from it: {'; '.join(stats.lines())}; fix the rows{hint}")
    if control_tokens.pairs:
        LOG.warning(
            "%s: %s pairs contain control tokens of the tokenizer as text (%s), the first of them in row %d. They are "
            "trained on as control tokens; replace them in the data if this is not intended.",
            spec.where,
            f"{control_tokens.pairs:,}",
            ", ".join(f"{token} in {count:,}" for token, count in control_tokens.found.most_common(9)),
            control_tokens.first_row,
        )
    below = {name: stats.below(name) for name in stats.names}
    LOG.info(
        "%s: the chosen response has a lower score than the rejected one on %s.",
        spec.where,
        ", ".join(f"{name} in {count:,} pairs" for name, count in below.items() if count) or "nothing",
    )
    return store


def raw_table(cfg: Mapping[str, Any], spec: DataSpec) -> Dataset:
    """Load the rows that Axolotl maps over, with Axolotl's own loader."""
    kind = f"{PREFIX}{spec.strategy}@{spec.key}"
    entries = [*(cfg["datasets"] or []), *(cfg.get("test_datasets") or [])]
    entry = next(entry for entry in entries if entry["type"] == kind)
    table: Any = load_dataset_with_config(entry, cfg.get("hf_use_auth_token"), streaming=False)
    return table["train"] if isinstance(table, DatasetDict) else table


def directive_scores(pair: PreferencePair, spec: DataSpec) -> dict[str, float]:
    """Return the chosen response's score of every dimension, on the scale of the directives."""
    target = spec.settings.score_range
    return (
        {}
        if target is None
        else {name: rescale(pair.chosen.score(name), scale, target, name) for name, scale in spec.scales.items()}
    )


def _raise_data_error(batch: Mapping[str, list[Any]], indices: Sequence[int], *, message: str) -> Columns:
    raise DataError(message)


def _transform(
    batch: Mapping[str, list[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    store: PairStore,
    spec: DataSpec,
    sequence_len: int,
) -> Columns:
    renderer = ChatRenderer(tokenizer)
    names = _columns(spec.settings)
    pairs = store.between(indices[0], indices[-1])
    if not pairs:
        return {name: [] for name in names}
    renders = [
        partial(_prompts, renderer=renderer, directives=_located(spec, number, _directives, pair, spec))
        for number, pair in pairs
    ]
    texts = [
        _located(spec, number, _texts, pair, render, renderer)
        for (number, pair), render in zip(pairs, renders, strict=True)
    ]
    ids = iter(tokenize(tokenizer, [text for prompts, *sides in texts for text in (*prompts, *sides)]))
    rows = []
    for (number, pair), render, (prompts, chosen, rejected) in zip(pairs, renders, texts, strict=True):
        whole = TokenizedPair(prompts, chosen, rejected, [next(ids) for _ in prompts], next(ids), next(ids))
        limits = (tokenizer, sequence_len, spec.excess_length_strategy)
        rows.append(_row(pair, _located(spec, number, fit, whole, pair.prompt, render, *limits), spec.settings))
    return {name: [row[name] for row in rows] for name in names}


def _located(spec: DataSpec, number: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; report an error of a row with its data set and number."""
    try:
        return function(*args)
    except RowError as error:
        raise DataError(f"{spec.where}, row {number}: {error}") from None


def _directives(pair: PreferencePair, spec: DataSpec) -> Sequence[Directive]:
    """Return the directives of the D prompts.

    Raises:
        RowError: if a template cannot be rendered with the pair's scores.
    """
    scores = directive_scores(pair, spec)
    try:
        return spec.settings.training_directives(scores)
    except ValueError as error:
        raise RowError(str(error)) from None


def _prompts(messages: list[Message], *, renderer: ChatRenderer, directives: Sequence[Directive]) -> list[str]:
    return [renderer.prompt(with_directive(messages, each)) for each in directives]


def _texts(pair: PreferencePair, render: Render, renderer: ChatRenderer) -> tuple[list[str], str, str]:
    chosen, rejected = (renderer.completion(pair.prompt, side.text) for side in (pair.chosen, pair.rejected))
    return render(pair.prompt), chosen, rejected


def _row(pair: PreferencePair, tokens: TokenizedPair, settings: RowSettings) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": tokens.prompts[tokens.longest],
        "chosen": tokens.chosen,
        "rejected": tokens.rejected,
        "prompt_input_ids": tokens.prompt_ids,
        "chosen_input_ids": tokens.chosen_ids,
        "rejected_input_ids": tokens.rejected_ids,
        "prompt_key": pair.prompt_key,
        "cut_prompt_tokens": tokens.cut_prompt_tokens,
        "cut_completion_tokens": tokens.cut_completion_tokens,
    }
    if settings.margins is not None:
        for side, response, ids in (
            ("chosen", pair.chosen, tokens.chosen_ids),
            ("rejected", pair.rejected, tokens.rejected_ids),
        ):
            row[f"{side}_margin_rewards"] = [
                source.row_reward(name, response, len(ids)) for name, source in settings.margins.items()
            ]
    if settings.texts:
        row |= {"messages": json.dumps(pair.prompt), "chosen_text": pair.chosen.text}
        row["rejected_text"] = pair.rejected.text
    return row

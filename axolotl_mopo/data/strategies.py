"""The strategies that a data set's `type:` names: turn Axolotl's rows into token ids."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from axolotl_mopo.data.pair_tokens import PairTexts, TokenizedPair, tokenize_pairs
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.rows import Message, PreferencePair, rescale
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.tokenizing import ControlTokenCount, control_tokens
from axolotl_mopo.data.truncation import Render, fit
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
    "chosen_spans": List(Value("int32")),
    "rejected_spans": List(Value("int32")),
    "prompt_key": Value("int64"),
    "cut_prompt_tokens": Value("int32"),
    "cut_completion_tokens": Value("int32"),
}
_MARGINS = {f"{side}_margin_rewards": List(Value("float64")) for side in ("chosen", "rejected")}
_TEXTS = {
    name: Value("string") for name in ("messages", "chosen_turns", "rejected_turns", "chosen_text", "rejected_text")
}


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
        the ranges of the responses' tokens that are trained on, each with its end (`chosen_spans`, `rejected_spans`);
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
        renderer = ChatRenderer(tokenizer, spec.chat_template_kwargs)
    except DataError as error:
        raise DataError(f"{spec.where}: {error}") from None
    reader = PairReader(raw_table(cfg, spec), spec, partial(renderer.check, turns=spec.options.turns))
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
    names = _columns(spec.settings)
    pairs = store.between(indices[0], indices[-1])
    if not pairs:
        return {name: [] for name in names}
    tokenization = Tokenization(tokenizer, spec)
    renders = [_located(spec, number, tokenization.render, pair) for number, pair in pairs]
    texts = [
        _located(spec, number, tokenization.texts, pair, render)
        for (number, pair), render in zip(pairs, renders, strict=True)
    ]
    ids = tokenize_pairs(tokenizer, texts)
    rows = []
    for (number, pair), render, each in zip(pairs, renders, texts, strict=True):
        tokens = _located(spec, number, tokenization.tokens, pair, render, each, ids, sequence_len)
        rows.append(_row(pair, tokens, spec.settings))
    return {name: [row[name] for row in rows] for name in names}


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, spec: DataSpec, sequence_len: int
) -> dict[str, Any]:
    """Return the prepared row of a single pair; see `_strategy`.

    Raises:
        RowError: if it cannot be rendered, or is too long and must not be shortened.
    """
    tokenization = Tokenization(tokenizer, spec)
    render = tokenization.render(pair)
    texts = tokenization.texts(pair, render)
    tokens = tokenization.tokens(pair, render, texts, tokenize_pairs(tokenizer, [texts]), sequence_len)
    return _row(pair, tokens, spec.settings)


class Tokenization:
    """Turns the pairs of a data set into token ids.

    Args:
        tokenizer: the tokenizer of the run.
        spec: the settings of the data set.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        self.renderer = ChatRenderer(tokenizer, spec.chat_template_kwargs)
        self._control_tokens = control_tokens(tokenizer)

    def render(self, pair: PreferencePair) -> Render:
        """Return the function that renders the D prompts of a pair, or of a part of its prompt.

        Raises:
            RowError: if a directive cannot be rendered with the pair's scores.
        """
        return partial(self._prompts, pair=pair, directives=_directives(pair, self.spec))

    def texts(self, pair: PreferencePair, render: Render) -> PairTexts:
        """Render a pair.

        Raises:
            RowError: if the chat template cannot be rendered with it.
        """
        options = self.spec.options
        if self.spec.settings.texts and not (pair.chosen.text.strip() and pair.rejected.text.strip()):
            raise RowError(
                "a response ends with a tool call and has no text, which a margin that reads texts cannot score; leave "
                "such rows out, or use a margin of another source"
            )
        plain = self.renderer.prompt(pair.prompt, pair.inputs)
        chosen, rejected = (
            self.renderer.response(pair.prompt, side, pair.inputs, options.completion, options.turns, plain)
            for side in (pair.chosen, pair.rejected)
        )
        return PairTexts(render(pair.prompt), plain, chosen, rejected, self._control_tokens)

    def tokens(
        self, pair: PreferencePair, render: Render, texts: PairTexts, ids: Iterator[list[int]], sequence_len: int
    ) -> TokenizedPair:
        """Return the token ids of a pair, shortened to `sequence_len`.

        Raises:
            RowError: if its responses cannot be separated, or it is too long and must not be shortened.
        """
        whole = texts.assemble(self.tokenizer, ids)
        return fit(whole, pair.prompt, render, self.tokenizer, sequence_len, self.spec.excess_length_strategy)

    def _prompts(self, messages: list[Message], *, pair: PreferencePair, directives: Sequence[Directive]) -> list[str]:
        return [self.renderer.prompt(with_directive(messages, each), pair.inputs) for each in directives]


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


def _row(pair: PreferencePair, tokens: TokenizedPair, settings: RowSettings) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": tokens.prompts[tokens.longest],
        "chosen": tokens.chosen,
        "rejected": tokens.rejected,
        "prompt_input_ids": tokens.prompt_ids,
        "chosen_input_ids": tokens.chosen_ids,
        "rejected_input_ids": tokens.rejected_ids,
        "chosen_spans": [border for span in tokens.chosen_spans for border in span],
        "rejected_spans": [border for span in tokens.rejected_spans for border in span],
        "prompt_key": pair.prompt_key,
        "cut_prompt_tokens": tokens.cut_prompt_tokens,
        "cut_completion_tokens": tokens.cut_completion_tokens,
    }
    if settings.margins is not None:
        for side, response, spans in (
            ("chosen", pair.chosen, tokens.chosen_spans),
            ("rejected", pair.rejected, tokens.rejected_spans),
        ):
            length = sum(end - start for start, end in spans)
            row[f"{side}_margin_rewards"] = [
                source.row_reward(name, response, length) for name, source in settings.margins.items()
            ]
    if settings.texts:
        row["messages"] = json.dumps(pair.prompt)
        for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            row |= {f"{name}_turns": json.dumps(response.messages[:-1]), f"{name}_text": response.text}
    return row

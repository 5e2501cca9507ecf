"""The strategies that a data set's `type:` names: from the host's rows to token ids."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.data.directives import dimension_directive, integrated_directive, with_directive
from axolotl_mopo.data.entries import AMoPOData, DataSpec, MODPOData
from axolotl_mopo.data.rows import DataError, PreferencePair, RowError, read_pair, rescale
from axolotl_mopo.data.tokenizing import ChatRenderer, shorten, tokenize
from axolotl_mopo.margins import Response, build_margin

Strategy = tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]


class _Texts(NamedTuple):
    """One pair as text: D prompts that share both completions."""

    prompts: list[str]
    chosen: str
    rejected: str


def find_strategy(name: str) -> Callable[..., Strategy]:
    """The strategy that a data set's type names, bound to the settings whose key follows an `@`.

    Raises:
        AttributeError: where there is no such strategy.
    """
    strategy, _, key = name.partition("@")
    if strategy not in _STRATEGIES:
        raise AttributeError(f"module 'axolotl_mopo' has no attribute {name!r}")
    return partial(_STRATEGIES[strategy], key=key) if key else _STRATEGIES[strategy]


def pairs(cfg: Mapping[str, Any], dataset_idx: int | None = None, *, key: str, **_: Any) -> Strategy:
    """Preference pairs of the general shape: a prompt or messages, a chosen and a rejected response, scores.

    Args:
        cfg: the host's configuration.
        dataset_idx: the host's number of the data set; it does not tell train and test apart, `key` does.
        key: which entry of `cfg["mopo_data"]` holds the data set's settings.

    Returns:
        The transform of a batch of rows, and the arguments of the `datasets.map` that applies it. The rows hold token
        ids (`prompt_input_ids`: a list for each prompt; `chosen_input_ids`, `rejected_input_ids`), MODPO's margin
        rewards (`chosen_margins`, `rejected_margins`), and for the host's length filter the strings `prompt` (the
        longest one), `chosen`, `rejected`.
    """
    spec = DataSpec.model_validate(dict(cfg["mopo_data"][key]))
    transform = partial(_transform, spec=spec, sequence_len=cfg["sequence_len"])
    return transform, {"batched": True, "with_indices": True, "remove_columns": "__all__"}


_STRATEGIES: dict[str, Callable[..., Strategy]] = {"pairs": pairs}


def _transform(
    batch: Mapping[str, list[Any]],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    spec: DataSpec,
    sequence_len: int,
) -> dict[str, list[Any]]:
    try:
        renderer = ChatRenderer(tokenizer)
    except DataError as error:
        raise DataError(f"{spec.where}: {error}") from None
    raw = zip(indices, _rows(batch), strict=True)
    read = [_locating(spec, index, _read, row, renderer, spec) for index, row in raw]
    texts_in_order = (text for _, texts in read for text in (*texts.prompts, texts.chosen, texts.rejected))
    ids = iter(tokenize(tokenizer, texts_in_order))
    rows = []
    for index, (pair, texts) in zip(indices, read, strict=True):
        prompt_ids = [next(ids) for _ in texts.prompts]
        row = _locating(spec, index, _fit, texts, prompt_ids, next(ids), next(ids), tokenizer, spec, sequence_len)
        if isinstance(spec.data, MODPOData):
            row |= _locating(spec, index, _margins, pair, row, spec.data)
        rows.append(row)
    return {column: [row[column] for row in rows] for column in rows[0]}


def _rows(batch: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _locating(spec: DataSpec, index: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; what it says of a row is told with data set and row number."""
    try:
        return function(*args)
    except RowError as error:
        raise DataError(f"{spec.where}, row {index}: {error}") from None


def _read(row: Mapping[str, Any], renderer: ChatRenderer, spec: DataSpec) -> tuple[PreferencePair, _Texts]:
    pair = read_pair(row, spec.options)
    conversations = [pair.prompt]
    if isinstance(spec.data, AMoPOData):
        conversations = [with_directive(pair.prompt, directive) for directive in _directives(pair, spec.data, spec)]
    return pair, _Texts(
        [renderer.prompt(messages) for messages in conversations],
        renderer.completion(pair.prompt, pair.chosen),
        renderer.completion(pair.prompt, pair.rejected),
    )


def _directives(pair: PreferencePair, data: AMoPOData, spec: DataSpec) -> Iterator[str]:
    if data.integrated:
        yield integrated_directive(data.directives, data.dimensions, data.score_range)
    for dimension in data.dimensions:
        score = rescale(pair.chosen_score(dimension), spec.options.score_scale, data.score_range, dimension)
        yield dimension_directive(data.directives, dimension, score, data.dimensions, data.score_range)


def _fit(
    texts: _Texts,
    prompt_ids: list[list[int]],
    chosen_ids: list[int],
    rejected_ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    sequence_len: int,
) -> dict[str, Any]:
    """The row as the host wants it; the longest prompt, its directive included, decides whether the row fits."""
    longest = max(range(len(prompt_ids)), key=lambda prompt: len(prompt_ids[prompt]))
    limit = sequence_len - len(prompt_ids[longest])
    chosen, rejected = texts.chosen, texts.rejected
    if spec.excess_length_strategy == "raise" and max(len(chosen_ids), len(rejected_ids)) > limit:
        raise RowError(
            f"it needs {len(prompt_ids[longest]) + max(len(chosen_ids), len(rejected_ids))} tokens, its directive "
            f"included, more than sequence_len: {sequence_len}; raise that, or set excess_length_strategy to drop or "
            "truncate"
        )
    if spec.excess_length_strategy == "truncate" and limit > 0:
        # A row whose prompt alone is too long stays as it is: the host drops and counts it.
        if len(chosen_ids) > limit:
            chosen_ids, chosen = shorten(tokenizer, chosen_ids, limit)
        if len(rejected_ids) > limit:
            rejected_ids, rejected = shorten(tokenizer, rejected_ids, limit)
    return {
        "prompt": texts.prompts[longest],
        "chosen": chosen,
        "rejected": rejected,
        "prompt_input_ids": prompt_ids,
        "chosen_input_ids": chosen_ids,
        "rejected_input_ids": rejected_ids,
    }


def _margins(pair: PreferencePair, row: Mapping[str, Any], data: MODPOData) -> dict[str, list[float]]:
    rewards = [build_margin(name, margin) for name, margin in data.margins.items()]
    chosen = Response(pair.chosen, len(row["chosen_input_ids"]), pair.chosen_score)
    rejected = Response(pair.rejected, len(row["rejected_input_ids"]), pair.rejected_score)
    return {
        "chosen_margins": [reward(chosen) for reward in rewards],
        "rejected_margins": [reward(rejected) for reward in rewards],
    }

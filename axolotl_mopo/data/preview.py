"""Render the prompts of an AMoPO YAML, for `axolotl mopo directives`."""

from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer
from transformers import PreTrainedTokenizerBase

from axolotl_mopo.config import INTEGRATED, AMoPOConfig
from axolotl_mopo.config.directives import Directive, turn_template, with_directive_in_template
from axolotl_mopo.data import shown_tokens
from axolotl_mopo.data.conversations import user, with_directive
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.rows import NO_INPUTS, Message, PreferencePair, TemplateInputs
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.strategies import directive_scores, raw_table, tokenize_pair
from axolotl_mopo.errors import ConfigError, DataError, RowError


def preview(
    config: str, *, dataset: int, row: int, question: str | None, dimension: str | None, score: float | None
) -> dict[str, Any]:
    """Render the D prompts of one pair, or of a question at the best scores, and the prompt to use at inference.

    Args:
        config: path of the YAML.
        dataset: index of the pair's entry in `datasets:`.
        row: number of the pair's row; if it yields no pair, the next one that does is used.
        question: used in place of a pair, so that no data is read.
        dimension: the dimension to ask for at inference; all dimensions together if None.
        score: the score of this dimension; the best one if None.

    Returns:
        `training`, a list of prompts; `inference`, one prompt; and `chat_template`, the tokenizer's chat template with
        the directive for inference built in. A prompt has `name`, `messages` and `text`; the one for inference also has
        `user_template`, or `system_template` with `directive_position: system`. For a pair also `responses`: the tokens
        of both, and which of them are trained on.

    Raises:
        ConfigError: if the YAML has no `amopo:` block, or another argument is not valid.
        DataError: if the data cannot be read.
    """
    if not isinstance(yaml.safe_load(Path(config).read_text(encoding="utf-8")), dict):
        raise ConfigError(f"{config} must be a mapping of keys to values")
    cfg = load_cfg(config)
    if not cfg.get("amopo"):
        raise ConfigError(f"{config} has no `amopo:` block; only `rl: amopo` has directives")
    method = AMoPOConfig.model_validate(cfg.amopo.to_dict())
    tokenizer = load_tokenizer(cfg)
    renderer = ChatRenderer(tokenizer, cfg.get("chat_template_kwargs"))
    responses: dict[str, Any] = {}
    if question is None:
        pair, spec = _pair(cfg, dataset, row)
        messages, inputs, scores = pair.prompt, pair.inputs, directive_scores(pair, spec)
        responses = {"responses": _responses(tokenizer, pair, spec, cfg["sequence_len"])}
    else:
        messages, inputs, scores = user(question), NO_INPUTS, dict.fromkeys(method.dimensions, method.score_range[1])
    try:
        directive = method.inference_directive(dimension, score)
    except ValueError as error:
        raise ConfigError(f"--dimension or --score: {error}") from None
    inference = _prompt(dimension or INTEGRATED, messages, inputs, directive, renderer)
    try:
        texts = method.training_directives(scores)
    except ValueError as error:
        raise DataError(f"`amopo.directives`: {error}") from None
    template = "system_template" if directive.in_system else "user_template"
    prompts = zip(method.prompt_names, texts, strict=True)
    return {
        "training": [_prompt(name, messages, inputs, text, renderer) for name, text in prompts],
        "inference": inference | {template: turn_template(directive)},
        "chat_template": with_directive_in_template(str(tokenizer.get_chat_template()), directive),
        **responses,
    }


def _prompt(
    name: str, messages: list[Message], inputs: TemplateInputs, directive: Directive, renderer: ChatRenderer
) -> dict[str, Any]:
    asked = with_directive(messages, directive)
    return {"name": name, "messages": asked, "text": renderer.prompt(asked, inputs)}


def _responses(
    tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, spec: DataSpec, sequence_len: int
) -> dict[str, Any]:
    try:
        return shown_tokens.responses(tokenizer, tokenize_pair(tokenizer, pair, spec, sequence_len))
    except RowError as error:
        raise DataError(f"{spec.where}: {error}") from None


def _pair(cfg: Any, dataset: int, row: int) -> tuple[PreferencePair, DataSpec]:
    if not 0 <= dataset < len(cfg.datasets):
        raise ConfigError(f"--dataset {dataset}: there are {len(cfg.datasets)} entries, counted from 0")
    _, _, key = cfg.datasets[dataset]["type"].partition("@")
    spec = DataSpec.model_validate(dict(cfg["mopo_data"][key]))
    reader = PairReader(raw_table(cfg, spec), spec)
    pair = next((pair for number, pair in reader.pairs() if number >= row), None)
    if pair is None:
        raise DataError(f"{spec.where}: there is no pair from row {row} on, in {reader.stats.rows} rows; lower --row")
    return pair, spec

"""The prompts that a YAML of AMoPO means, for `axolotl mopo directives`."""

from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.config import load_cfg
from axolotl.loaders import load_tokenizer

from axolotl_mopo.config import INTEGRATED, AMoPOConfig
from axolotl_mopo.config.directives import Directive, user_template, with_directive_in_template
from axolotl_mopo.data.conversations import user, with_directive
from axolotl_mopo.data.pairing import PairReader
from axolotl_mopo.data.rows import Message
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.strategies import directive_scores, raw_table
from axolotl_mopo.data.tokenizing import ChatRenderer
from axolotl_mopo.errors import ConfigError, DataError


def preview(
    config: str, *, dataset: int, row: int, question: str | None, dimension: str | None, score: float | None
) -> dict[str, Any]:
    """The D prompts of one pair, or of a question at the best scores, and the prompt to use at inference.

    Args:
        config: the YAML's path.
        dataset: which entry of `datasets:` the pair is of.
        row: its row; a later one where that row completes no pair.
        question: in the place of the pair's, so that no data is read.
        dimension: what to ask for at inference; all dimensions together where None.
        score: of this dimension; the best where None.

    Returns:
        `training`, a list of prompts, `inference`, one prompt, and `chat_template`, the tokenizer's with the directive
        for inference built in. A prompt holds `name`, `messages`, `text`, and the one for inference `user_template`.

    Raises:
        ConfigError: where the YAML is not AMoPO's, or does not fit the other arguments.
        DataError: where the data cannot be read.
    """
    if not isinstance(yaml.safe_load(Path(config).read_text(encoding="utf-8")), dict):
        raise ConfigError(f"{config} is no mapping of keys to values")
    cfg = load_cfg(config)
    if not cfg.get("amopo"):
        raise ConfigError(f"{config} has no `amopo:` block; directives belong to `rl: amopo`")
    method = AMoPOConfig.model_validate(cfg.amopo.to_dict())
    tokenizer = load_tokenizer(cfg)
    renderer = ChatRenderer(tokenizer)
    if question is None:
        messages, scores = _pair(cfg, dataset, row)
    else:
        messages, scores = user(question), dict.fromkeys(method.dimensions, method.score_range[1])
    try:
        directive = method.inference_directive(dimension, score)
    except ValueError as error:
        raise ConfigError(f"--dimension or --score: {error}") from None
    inference = _prompt(dimension or INTEGRATED, messages, directive, renderer)
    try:
        texts = method.training_directives(scores)
    except ValueError as error:
        raise DataError(f"`amopo.directives`: {error}") from None
    prompts = zip(method.prompt_names, texts, strict=True)
    return {
        "training": [_prompt(name, messages, text, renderer) for name, text in prompts],
        "inference": inference | {"user_template": user_template(directive)},
        "chat_template": with_directive_in_template(str(tokenizer.get_chat_template()), directive),
    }


def _prompt(name: str, messages: list[Message], directive: Directive, renderer: ChatRenderer) -> dict[str, Any]:
    asked = with_directive(messages, directive)
    return {"name": name, "messages": asked, "text": renderer.prompt(asked)}


def _pair(cfg: Any, dataset: int, row: int) -> tuple[list[Message], dict[str, float]]:
    if not 0 <= dataset < len(cfg.datasets):
        raise ConfigError(f"--dataset {dataset}: there are {len(cfg.datasets)} entries, counted from 0")
    _, _, key = cfg.datasets[dataset]["type"].partition("@")
    spec = DataSpec.model_validate(dict(cfg["mopo_data"][key]))
    reader = PairReader(raw_table(cfg, spec), spec)
    pair = next((pair for number, pair in reader.pairs() if number >= row), None)
    if pair is None:
        raise DataError(f"{spec.where}: there is no pair from row {row} on, of {reader.stats.rows} rows")
    return pair.prompt, directive_scores(pair, spec)

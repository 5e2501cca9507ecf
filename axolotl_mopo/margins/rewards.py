"""Rewards that are computed of texts: a reward model's, and a user's function's."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import tqdm
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from axolotl_mopo.config import ConfigError, RewardModelMargin, TextMargin
from axolotl_mopo.data.rows import DataError, Message, RowError
from axolotl_mopo.data.tokenizing import render_chat
from axolotl_mopo.margins.functions import function_name, reward_function
from axolotl_mopo.margins.loading import load_whole
from axolotl_mopo.margins.settling import find_head

Rewards = Callable[[list[list[Message]], list[str], Sequence[int]], list[float]]
"""Prompts, one response to each, and the numbers of their rows -> a reward of each response."""


def function_rewards(margin: TextMargin) -> Rewards:
    """What a function says of responses.

    Raises:
        DataError: from the result, where the function raises, or returns something else than a finite number for each
            response; naming it and the first row of the batch, or the row.
    """
    function, name = reward_function(margin), function_name(margin)

    def rewards(prompts: list[list[Message]], responses: list[str], numbers: Sequence[int]) -> list[float]:
        where = f"{name}, called with {len(responses)} responses, of row {numbers[0]} the first,"
        try:
            values = [float(value) for value in function(prompts, responses)]
        except (Exception, SystemExit) as error:
            raise DataError(f"{where} raised {error!r}") from error
        if len(values) != len(responses):
            raise DataError(f"{where} returned {len(values)} numbers")
        for number, prompt, value in zip(numbers, prompts, values, strict=True):
            if not math.isfinite(value):
                raise DataError(f"{name} returned {value} for row {number}, {prompt[-1]['content']!r:.80}")
        return values

    return rewards


@contextmanager
def model_rewards(margin: RewardModelMargin, device: torch.device) -> Iterator[Rewards]:
    """What a reward model says of responses; the model is loaded, and freed afterwards.

    Raises:
        ConfigError: where its head or its chat template is not clear.
        DataError: from the result, where a conversation cannot be written, or is longer than the model takes, or a
            reward is not finite.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(margin.path)
    model = load_whole(AutoModelForSequenceClassification, margin.path, getattr(torch, margin.dtype))
    head = find_head(margin, {str(name): index for name, index in (model.config.label2id or {}).items()})
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {margin.path} has no chat template; use `source: callable` for such a model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    model.to(device).eval()

    def written(conversation: list[Message], number: int) -> str:
        try:
            return render_chat(tokenizer, conversation)
        except RowError as error:
            raise DataError(f"{margin.path}, row {number}: {error}") from None

    @torch.no_grad()
    def rewards(prompts: list[list[Message]], responses: list[str], numbers: Sequence[int]) -> list[float]:
        texts = [
            written([*prompt, {"role": "assistant", "content": response}], number)
            for prompt, response, number in zip(prompts, responses, numbers, strict=True)
        ]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        if (length := inputs["input_ids"].shape[1]) > limit:
            raise DataError(f"{margin.path} takes {limit} tokens; one of the rows {list(numbers)} has {length}")
        values = model(**inputs.to(device)).logits[:, head].float().tolist()
        if bad := [number for number, value in zip(numbers, values, strict=True) if not math.isfinite(value)]:
            raise DataError(f"{margin.path} gives row {bad[0]} a reward that is not finite")
        return values

    try:
        yield rewards
    finally:
        model.to("meta")  # frees the memory, whoever still refers to the model


def both_sides(
    rewards: Rewards, rows: Dataset, numbers: Sequence[int], batch_size: int, title: str, quiet: bool
) -> torch.Tensor:
    """The rewards of both responses of N prepared rows, [N, 2]."""
    table = torch.zeros(len(rows), 2)
    batches: Iterator[Any] = rows.select_columns(["messages", "chosen_text", "rejected_text"]).iter(batch_size)
    total = math.ceil(len(rows) / batch_size)
    for index, batch in enumerate(tqdm(batches, desc=title, total=total, disable=quiet)):
        prompts = [json.loads(text) for text in batch["messages"]]
        part = slice(index * batch_size, index * batch_size + len(prompts))
        for side, name in enumerate(("chosen_text", "rejected_text")):
            table[part, side] = torch.tensor(rewards(prompts, batch[name], numbers[part]))
    return table

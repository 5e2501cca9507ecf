"""The whole model that is in memory, one at a time, and what is asked of it: responses, and their log-probs."""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from axolotl_mopo.data.rows import user
from axolotl_mopo.data.tokenizing import ChatRenderer, tokenize
from axolotl_mopo.engine.attention import use_plain_attention, use_tree_attention
from axolotl_mopo.engine.layout import choose_layout
from axolotl_mopo.engine.packing import Share, lay_out
from axolotl_mopo.engine.scoring import Scorer
from axolotl_mopo.engine.trees import Pair
from axolotl_mopo.margins.adapters import with_adapter

_LOGITS_BUDGET = 1.5 * 2**30


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    samples: int = 1
    """Responses to each prompt."""
    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    seed: int = 42

    @property
    def exact(self) -> bool:
        """Whether responses are drawn from the policy itself, so that log-ratios estimate its divergence."""
        return self.temperature == 1 and self.top_p == 1


class Models:
    """Loads whole models, one at a time.

    Args:
        dtype: of the weights, as `from_pretrained` takes it.
    """

    def __init__(self, dtype: str = "auto") -> None:
        self.dtype = dtype
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._path: str | None = None
        self._model: Any = None

    def load(self, path: str) -> Any:
        """The model of a folder or of the hub; another one is freed."""
        if path != self._path:
            self.free()
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype)
            self._model = model.to(self.device).eval()
            self._path = path
        return self._model

    def free(self) -> None:
        """Forget the model."""
        self._path = self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def running(self, path: str, base: str | None) -> Iterator[Any]:
        """A whole model, or an adapter on its base, for a while."""
        model = self.load(base or path)
        if base is None:
            yield model
        else:
            with with_adapter(model, path) as adapted:
                yield adapted


def stop_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the model's own, and the one that the chat template ends a turn with."""
    ends = config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    (turn,) = tokenize(tokenizer, [ChatRenderer(tokenizer).completion(user("Why?"), "Because.")])
    if turn[-1] in tokenizer.added_tokens_decoder:
        stops.add(turn[-1])
    return sorted(stop for stop in stops if stop is not None)


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, stops: Sequence[int], seed: int
) -> list[list[list[int]]]:
    """Draw responses.

    Args:
        model: a causal language model.
        prompts: token ids.
        sampling: how to draw.
        stops: the tokens that end a response; it holds the first of them.
        seed: of these draws.

    Returns:
        For every prompt the token ids of `sampling.samples` responses.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[stops[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    # What is not said here would come from the model's own generation_config.
    config = GenerationConfig(
        **(drawn if sampling.temperature else {"do_sample": False}),
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.samples,
        repetition_penalty=1.0,
        num_beams=1,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
    responses = [_until_stop(tokens, stops) for tokens in output[:, width:].tolist()]
    return [responses[start : start + sampling.samples] for start in range(0, len(responses), sampling.samples)]


def _until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    return tokens[: next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))]


class SequenceScorer:
    """Log-probs of completions under a model.

    Args:
        model: as it is run.
        example: a prompt and a completion, which try the layout.
    """

    def __init__(self, model: Any, example: tuple[Sequence[int], Sequence[int]]) -> None:
        self.model = model
        prompt, completion = example
        self.layout = choose_layout(model, model, [Pair([prompt], completion, completion)])
        self.scorer = Scorer(model if self.layout.inside else None, _LOGITS_BUDGET)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """The log-probs of N completions, each given its prompt."""
        # A tree holds what is there twice once.
        pairs = [Pair([prompt], own, own) for prompt, own in zip(prompts, completions, strict=True)]
        batch = lay_out(pairs, Share(list(range(len(pairs)))), self.layout.packed, pad_token_id=0)
        if self.layout.packed:
            use_tree_attention(self.model)
        try:
            logps = self.scorer(self.model, send_to_device(batch, self.model.device)).logps
        finally:
            use_plain_attention(self.model)
        values: list[float] = logps.view(-1, 2)[:, 0].tolist()
        if bad := [value for value in values if not math.isfinite(value)]:
            raise ValueError(f"a log-prob is {bad[0]}; load the model in another precision, with --dtype")
        return values

"""Load one model at a time, draw responses from it, and compute their log-probs."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from axolotl_mopo.data.conversations import user
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.tokenizing import tokenize
from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.schema import Sampling
from axolotl_mopo.logprobs.attention import use_plain_attention, use_tree_attention
from axolotl_mopo.logprobs.computer import LogProbComputer
from axolotl_mopo.logprobs.layout import choose_layout
from axolotl_mopo.logprobs.trees import Completion, pack, pad
from axolotl_mopo.rewards.adapter_twin import with_adapter
from axolotl_mopo.rewards.loading import language_model_class, readable_weights

_LOGITS_BUDGET = 1.5 * 2**30


class Models:
    """Loads whole models, one at a time.

    Args:
        dtype: data type of the weights, as `from_pretrained` takes it.
    """

    def __init__(self, dtype: str = "auto") -> None:
        self.dtype = dtype
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._path: str | None = None
        self._model: Any = None

    def load(self, path: str) -> Any:
        """Load the model in a folder or of the hub, and free the one in memory."""
        if path != self._path:
            self.free()
            with readable_weights(path):
                model: Any = language_model_class(path).from_pretrained(path, dtype=self.dtype)
            self._model = model.to(self.device).eval()
            self._path = path
        return self._model

    def free(self) -> None:
        """Free the model."""
        self._path = self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def running(self, path: str, base: str | None) -> Iterator[Any]:
        """Context manager that loads a whole model, or an adapter on its base."""
        model = self.load(base or path)
        if base is None:
            yield model
        else:
            with with_adapter(model, path) as adapted:
                yield adapted


def stop_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the model's own, and the one that ends a turn in the chat template.

    Returns:
        Token ids, sorted.

    Raises:
        ConfigError: if there are none.
    """
    ends = config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    (turn,) = tokenize(tokenizer, [ChatRenderer(tokenizer).completion(user("Why?"), "Because.")])
    if turn[-1] in tokenizer.added_tokens_decoder:
        stops.add(turn[-1])
    found = sorted(stop for stop in stops if stop is not None)
    if not found:
        raise ConfigError(
            f"the tokenizer in {tokenizer.name_or_path} has no end-of-text token, and its chat template ends turns "
            "without one, so no response would end; set `eos_token` in its tokenizer_config.json"
        )
    return found


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, stops: Sequence[int], seeds: Sequence[int]
) -> list[list[list[int]]]:
    """Draw responses.

    Args:
        model: a causal language model.
        prompts: token ids of each prompt.
        sampling: sampling settings.
        stops: token ids that end a response; a response includes its stop token.
        seeds: one per prompt. The randomness of a response depends only on its prompt's seed and its sample number.

    Returns:
        For every prompt the token ids of `sampling.samples` responses.
    """
    own = model.generation_config
    config = generation_config(own, sampling)
    width, rows = max(map(len, prompts)), [prompt for prompt in prompts for _ in range(sampling.samples)]
    ids = torch.tensor([[stops[0]] * (width - len(prompt)) + list(prompt) for prompt in rows])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in rows])
    processors = LogitsProcessorList()
    if config.do_sample:
        processors.extend(_warpers(config))
        numbers = [_numbers(seed, sample, sampling) for seed in seeds for sample in range(sampling.samples)]
        processors.append(_Draw(torch.stack(numbers).to(model.device), width))
    config.update(
        do_sample=False,  # `_Draw` samples, and leaves one token
        **dict.fromkeys(_WARPERS),
        max_new_tokens=sampling.max_new_tokens,
        max_length=None,
        num_return_sequences=1,
        return_dict_in_generate=False,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )
    model.generation_config = GenerationConfig()  # otherwise `generate` fills in what `config` does not set
    try:
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=processors,
        )
    finally:
        model.generation_config = own
    responses = [_until_stop(tokens, stops) for tokens in output[:, width:].tolist()]
    return [responses[start : start + sampling.samples] for start in range(0, len(responses), sampling.samples)]


def generation_config(own: GenerationConfig, sampling: Sampling) -> GenerationConfig:
    """The settings of the distribution to sample from, without lengths, number of responses and stop tokens.

    Args:
        own: the model's own settings, used if `sampling.generation_config` is `model`.
        sampling: sampling settings.

    Raises:
        ConfigError: if the model's own settings are wrong or not supported.
    """
    if sampling.generation_config == "neutral":
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(**(drawn if sampling.temperature else {"do_sample": False}))
    config = GenerationConfig(**own.to_dict())
    if other := [name for name, neutral in _NOT_FOLLOWED.items() if getattr(config, name, None) not in (None, neutral)]:
        raise ConfigError(
            f"--generation-config model: the model's own settings have {', '.join(other)}, which is not supported; "
            "remove the option"
        )
    try:
        list(_warpers(config))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--generation-config model: the model's own settings are wrong: {error}; remove the option"
        ) from None
    if sampling.samples > 1 and not config.do_sample:
        raise ConfigError(
            "--generation-config model: the model's own settings use greedy decoding, so every response to a "
            "prompt would be the same; use --samples 1, or remove the option"
        )
    return config


_NOT_FOLLOWED = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale"), 1),
    **dict.fromkeys(("token_healing", "use_mtp", "dola_layers", "prompt_lookup_num_tokens", "penalty_alpha"), False),
    **dict.fromkeys(("max_time", "stop_strings", "watermarking_config", "constraints", "force_words_ids"), None),
    **dict.fromkeys(("forced_eos_token_id", "assistant_model"), None),
}
"""Settings that search instead of sampling, depend on time, or need more than token ids -> their neutral value."""

_WARPERS: dict[str, tuple[Any, Callable[[float], bool]]] = {
    "temperature": (TemperatureLogitsWarper, lambda value: value != 1),
    "top_h": (TopHLogitsWarper, lambda value: True),
    "top_k": (TopKLogitsWarper, lambda value: value > 0),
    "top_p": (TopPLogitsWarper, lambda value: value < 1),
    "min_p": (MinPLogitsWarper, lambda value: True),
    "typical_p": (TypicalLogitsWarper, lambda value: value < 1),
    "epsilon_cutoff": (EpsilonLogitsWarper, lambda value: value > 0),
    "eta_cutoff": (EtaLogitsWarper, lambda value: value > 0),
}
"""Settings that change the sampling distribution, in transformers' order -> the warper, and whether a value acts."""


def _warpers(config: GenerationConfig) -> Iterator[LogitsProcessor]:
    for name, (kind, acts) in _WARPERS.items():
        value = getattr(config, name)
        if value is not None and acts(value):
            yield kind(float(value) if name == "temperature" else value)


def _numbers(seed: int, sample: int, sampling: Sampling) -> Tensor:
    """Uniform random numbers in [0, 1) for the tokens of a response, float64 [max_new_tokens]."""
    generator = torch.Generator().manual_seed(fingerprint([seed, sample]))
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)


class _Draw(LogitsProcessor):
    """Samples the next token of every row with the row's own random numbers, so the batch has no influence.

    Args:
        numbers: uniform random numbers in [0, 1), [rows, tokens].
        width: number of tokens before the first sampled one.
    """

    def __init__(self, numbers: Tensor, width: int) -> None:
        self.numbers, self.width = numbers, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [rows, vocabulary] -> 0 for the sampled token of each row, minus infinity for the others."""
        totals = scores.double().softmax(-1).cumsum(-1)
        if not totals[:, -1].isfinite().all():
            raise ValueError("a logit is not finite; load the model in another precision, with --dtype")
        wanted = self.numbers[:, input_ids.shape[1] - self.width].unsqueeze(-1) * totals[:, -1:]
        drawn = torch.searchsorted(totals, wanted, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def _until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    return tokens[: next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))]


class CompletionLogps:
    """Computes the log-probs of completions under a model.

    Args:
        model: the model, with its adapter if any.
        example: token ids of a prompt and a completion, used to choose the layout.
    """

    def __init__(self, model: Any, example: tuple[Sequence[int], Sequence[int]]) -> None:
        self.model = model
        prompt, completion = example
        self.layout = choose_layout(model, model, [Completion(prompt, completion)])
        self.computer = LogProbComputer(model if self.layout.fused_head else None, _LOGITS_BUDGET)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """The log-prob of each completion given its prompt; N prompts, N completions -> N numbers."""
        items = [Completion(*pair) for pair in zip(prompts, completions, strict=True)]
        batch = pack(items) if self.layout.packed else pad(items, pad_token_id=0)
        if self.layout.packed:
            use_tree_attention(self.model)
        try:
            logps = self.computer(self.model, send_to_device(batch, self.model.device)).logps
        finally:
            use_plain_attention(self.model)
        values: list[float] = logps.tolist()
        if bad := [value for value in values if not math.isfinite(value)]:
            raise ValueError(f"a log-prob is {bad[0]}; load the model in another precision, with --dtype")
        return values

"""What draws responses: vLLM where it is installed, transformers otherwise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from peft import PeftConfig
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from axolotl_mopo.config import ConfigError
from axolotl_mopo.front.models import Models, Sampling, generate, stop_tokens
from axolotl_mopo.front.policies import Policy

Draw = Callable[[Sequence[Sequence[int]], int], list[list[tuple[list[int], bool]]]]
"""Prompts' token ids and a seed -> for every prompt its responses: token ids, and whether they ended by themselves."""


class Engine(Protocol):
    """What draws responses."""

    def running(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> AbstractContextManager[Draw]:
        """Have a policy in memory for a while."""

    def close(self) -> None:
        """Free the memory."""


def choose_engine(name: str, models: Models, sampling: Sampling) -> Engine:
    """The engine of a name; `auto` takes vLLM where it is installed.

    Raises:
        ConfigError: where vLLM is wanted and not installed.
    """
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise ConfigError("--engine vllm: vLLM is not installed; pip install vllm, or use --engine transformers")
    if name == "transformers" or not installed:
        return TransformersEngine(models, sampling)
    return VLLMEngine(models.dtype, sampling)


@dataclass
class TransformersEngine:
    """Draws with transformers' own `generate`."""

    models: Models
    sampling: Sampling

    @contextmanager
    def running(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[Draw]:
        """See `Engine`."""
        with self.models.running(policy.path, policy.base) as model:
            stops = stop_tokens(model.generation_config, tokenizer)

            def draw(prompts: Sequence[Sequence[int]], seed: int) -> list[list[tuple[list[int], bool]]]:
                drawn = generate(model, prompts, self.sampling, stops, seed)
                return [[(tokens, tokens[-1] in stops) for tokens in responses] for responses in drawn]

            yield draw

    def close(self) -> None:
        """The models stay, for the log-probs."""


class VLLMEngine:
    """Draws with vLLM; adapters of one base model share it.

    Args:
        dtype: of the weights, as vLLM takes it.
        sampling: how to draw.
    """

    def __init__(self, dtype: str, sampling: Sampling) -> None:
        self.dtype, self.sampling = dtype, sampling
        self._model: Any = None
        self._loaded: tuple[str, int] | None = None
        self._adapters = 0

    @contextmanager
    def running(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[Draw]:
        """See `Engine`."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        rank = PeftConfig.from_pretrained(policy.path).r if policy.base else 0
        model = self._load(policy.whole, rank)
        stops = stop_tokens(_generation_config(policy.whole), tokenizer)
        adapter = None
        if policy.base:
            self._adapters += 1
            adapter = LoRARequest(policy.name, self._adapters, policy.path)

        def draw(prompts: Sequence[Sequence[int]], seed: int) -> list[list[tuple[list[int], bool]]]:
            parameters = [
                SamplingParams(
                    n=self.sampling.samples,
                    temperature=self.sampling.temperature,
                    top_p=self.sampling.top_p,
                    max_tokens=self.sampling.max_new_tokens,
                    stop_token_ids=stops,
                    seed=seed + number * self.sampling.samples,
                )
                for number in range(len(prompts))
            ]
            asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            outputs = model.generate(asked, parameters, lora_request=adapter, use_tqdm=False)
            return [
                [(list(one.token_ids), one.finish_reason == "stop") for one in output.outputs] for output in outputs
            ]

        yield draw

    def close(self) -> None:
        """See `Engine`."""
        self._model = self._loaded = None

    def _load(self, path: str, rank: int) -> Any:
        from vllm import LLM

        loaded, room = self._loaded or ("", 0)
        if path != loaded or rank > room:
            self.close()
            lora = {"enable_lora": True, "max_lora_rank": rank} if rank else {}
            # Its own defaults of sampling are not wanted.
            self._model = LLM(path, dtype=self.dtype, generation_config="vllm", **lora)
            self._loaded = (path, rank)
        return self._model


def _generation_config(path: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path))

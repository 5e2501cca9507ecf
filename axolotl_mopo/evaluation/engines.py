"""Engines that generate responses: vLLM if it is installed, otherwise transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pydantic import NonNegativeInt
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from axolotl_mopo.config.model_files import ADAPTER, AdapterConfig
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.models import Models, generate, generation_config, stop_tokens
from axolotl_mopo.evaluation.policies import Policy
from axolotl_mopo.evaluation.schema import Sampling
from axolotl_mopo.records import Record, read_record

Draw = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[tuple[list[int], bool]]]]
"""Token ids and a seed for each prompt -> responses to each: token ids, and whether a stop token ended them."""

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `max_lora_rank`."""
_VLLM_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The generation settings of a model that vLLM supports."""


class Engine(Protocol):
    """Generates responses."""

    def check(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Check, before any weights are loaded, that a policy can generate responses.

        Returns:
            The stop tokens of its responses, sorted.

        Raises:
            ConfigError: if the engine cannot run the policy.
        """

    def running(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> AbstractContextManager[Draw]:
        """Context manager that has a policy in memory."""

    def close(self) -> None:
        """Free the memory."""


def choose_engine(name: str, models: Models, sampling: Sampling) -> Engine:
    """The engine of a name; `auto` selects vLLM if it is installed.

    Raises:
        ConfigError: if `vllm` is selected but not installed.
    """
    installed = find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise ConfigError("--engine vllm: vLLM is not installed; pip install vllm, or use --engine transformers")
    if name == "transformers" or not installed:
        return TransformersEngine(models, sampling)
    return VLLMEngine(models.dtype, sampling)


@dataclass
class TransformersEngine:
    """Generates with transformers' `generate`."""

    models: Models
    sampling: Sampling

    def check(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """See `Engine`."""
        own = _generation_config(policy)
        generation_config(own, self.sampling)
        return stop_tokens(own, tokenizer)

    @contextmanager
    def running(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[Draw]:
        """See `Engine`."""
        with self.models.running(policy.path, policy.base) as model:
            stops = stop_tokens(model.generation_config, tokenizer)

            def draw(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[tuple[list[int], bool]]]:
                drawn = generate(model, prompts, self.sampling, stops, seeds)
                return [[(tokens, tokens[-1] in stops) for tokens in responses] for responses in drawn]

            yield draw

    def close(self) -> None:
        """Keeps the model, since the log-probs need it next."""


class VLLMEngine:
    """Generates with vLLM; adapters of one base model share it.

    Args:
        dtype: data type of the weights, as vLLM takes it.
        sampling: sampling settings.
    """

    def __init__(self, dtype: str, sampling: Sampling) -> None:
        self.dtype, self.sampling = dtype, sampling
        self._model: Any = None
        self._loaded: tuple[str, int] | None = None
        self._adapters = 0

    def check(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """See `Engine`."""
        own = _generation_config(policy)
        vllm_settings(own, self.sampling)
        if policy.base:
            adapter_rank(policy)
        return stop_tokens(own, tokenizer)

    @contextmanager
    def running(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[Draw]:
        """See `Engine`."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        model = self._load(policy.whole, adapter_rank(policy) if policy.base else 0)
        own = _generation_config(policy)
        settings, stops = vllm_settings(own, self.sampling), stop_tokens(own, tokenizer)
        adapter = None
        if policy.base:
            self._adapters += 1
            adapter = LoRARequest(policy.name, self._adapters, policy.path)

        def draw(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[tuple[list[int], bool]]]:
            parameters = [
                SamplingParams(
                    n=self.sampling.samples,
                    max_tokens=self.sampling.max_new_tokens,
                    stop_token_ids=stops,
                    seed=seed,
                    **settings,
                )
                for seed in seeds
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
            # "vllm" keeps vLLM from applying the model's generation_config.json.
            self._model = LLM(path, dtype=self.dtype, generation_config="vllm", **lora)
            self._loaded = (path, rank)
        return self._model


def adapter_rank(policy: Policy) -> int:
    """The smallest `max_lora_rank` of vLLM that fits an adapter.

    Raises:
        ConfigError: if the adapter's rank is too large.
    """
    rank = read_record(AdapterConfig, Path(policy.path) / ADAPTER).r or 0
    found = next((room for room in _VLLM_RANKS if room >= rank > 0), None)
    if found is None:
        raise ConfigError(
            f"{policy.name} has rank {rank}, and vLLM supports {_VLLM_RANKS[-1]} at most; use --engine transformers, "
            "or merge it with `axolotl merge-lora`"
        )
    return found


def vllm_settings(own: GenerationConfig, sampling: Sampling) -> dict[str, Any]:
    """The sampling settings as keyword arguments of vLLM's `SamplingParams`.

    Raises:
        ConfigError: if vLLM does not support one of the model's own settings.
    """
    config = generation_config(own, sampling)
    if not config.do_sample:
        config.temperature = 0.0
    defaults = GenerationConfig().to_dict()
    given = {name: value for name, value in config.to_dict().items() if value != defaults.get(name)}
    lengths_and_tokens = {name for name in given if name.endswith(("_token_id", "_length")) or name.startswith("_")}
    other = {*lengths_and_tokens, "max_new_tokens", "transformers_version", "use_cache", "cache_implementation"}
    if unknown := sorted(set(given) - set(_VLLM_SETTINGS) - other):
        raise ConfigError(
            f"--generation-config model: vLLM does not support {', '.join(unknown)} of the model's own settings; use "
            "--engine transformers"
        )
    return {name: value for name, value in given.items() if name in _VLLM_SETTINGS[1:]}


class _GenerationSettings(Record):
    """The keys of a model's `generation_config.json` that are read here."""

    eos_token_id: NonNegativeInt | list[NonNegativeInt] | None = None


def _generation_config(policy: Policy) -> GenerationConfig:
    """The generation settings of a policy's whole model, or else those derived from its `config.json`.

    Raises:
        ConfigError: if they cannot be read.
    """
    folder = Path(policy.whole)
    path = folder / GENERATION_CONFIG_NAME
    if path.exists():
        read_record(_GenerationSettings, path)
    try:
        if not folder.is_dir() or path.exists():
            with suppress(OSError):  # a model of the hub without this file
                return GenerationConfig.from_pretrained(policy.whole)
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(policy.whole))
    except Exception as error:
        raise ConfigError(
            f"the generation settings of {policy.whole} cannot be read: {error!r}; fix its "
            f"{GENERATION_CONFIG_NAME} or its config.json"
        ) from None

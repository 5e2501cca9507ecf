"""Replace the keys of a configuration that do not work on a CPU without a network."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_GPU = "it needs a GPU"
_SEVERAL = "it needs several GPUs"
_SERVICE = "it needs a service"
_KERNEL = "its kernels need a GPU"


@dataclass(frozen=True)
class Replaced:
    """A key with another value in the test."""

    key: str
    old: Any
    new: Any
    """None if the key is removed."""
    why: str
    is_exercised: bool = True
    """Whether the test still covers the feature of the key."""

    def __str__(self) -> str:
        new = "removed" if self.new is None else _short(self.new)
        return f"{self.key}: {_short(self.old)} -> {new} ({self.why})"


@dataclass(frozen=True)
class _Rule:
    keys: str
    """Pattern that matches whole keys."""
    why: str
    new: Any = None
    applies: Callable[[Any], bool] = bool


def _is_flash(value: Any) -> bool:
    return str(value) not in ("eager", "sdpa")


def _needs_gpu(optimizer: Any) -> bool:
    return bool(re.search(r"8bit|4bit|fp8|bnb|paged|galore|apollo|lomo|torchao", str(optimizer)))


def _is_offloaded(value: Any) -> bool:
    return bool(value) and value != "hidden_states"


_RULES = (
    _Rule(r"bf16|fp16|tf32|bfloat16|float16", "the test trains in float32", False),
    _Rule(r"fp8|fp8_.*|bf16_full_eval", _GPU),
    _Rule(r"attn_implementation", _KERNEL, "sdpa", _is_flash),
    _Rule(r"(flash|flex|sage|xformers|s2|eager)_attention|flash_attn_.*|attn_implementation_.*", _KERNEL),
    _Rule(r"deepspeed|fsdp|fsdp_.*|.*_parallel_(size|degree)|dp_(shard|replicate)_size|ring_attn_func", _SEVERAL),
    _Rule(r"heads_k_stride|ddp|ddp_.*|device_map|max_memory|gpu_memory_limit|world_size|n_gpu", _SEVERAL),
    _Rule(r"load_in_[48]bit|gptq|gptq_.*|bnb_config_kwargs|quantization|qat|model_quantization_config.*", _GPU),
    _Rule(r"optimizer", _GPU, "adamw_torch", _needs_gpu),
    _Rule(
        r"liger_.*|lora_(mlp|qkv|o|embedding)_kernel|unsloth_.*|use_kernels|use_scattermoe|cut_cross_entropy.*", _KERNEL
    ),
    _Rule(r"torch_compile|torch_compile_.*", "compiling takes minutes"),
    _Rule(r"activation_offloading|layer_offloading|offload_.*", _GPU, None, _is_offloaded),
    _Rule(r"use_(wandb|mlflow|comet|trackio|otel_metrics)|(wandb|mlflow|comet|trackio|otel_metrics)_.*", _SERVICE),
    _Rule(r"hub_.*|push_dataset_to_hub|hf_use_auth_token", "nothing is uploaded"),
    _Rule(r"use_ray|ray_.*|resources_per_worker", _SERVICE),
    _Rule(r"resume_from_checkpoint|auto_resume_from_checkpoints|profiler_.*", "the test is a separate run"),
    _Rule(r"unfrozen_parameters|peft_layers_to_transform|peft_layer_replication", "the tiny model has two layers"),
    _Rule(r"trust_remote_code", "only --trust-remote-code allows it"),
)
_PLUGINS = re.compile(r"liger|cut_cross_entropy|kernels|swanlab|diffusion|nemo", re.IGNORECASE)
_LARGEST = {"micro_batch_size": 2, "eval_batch_size": 2, "gradient_accumulation_steps": 2}


def for_a_cpu(cfg: Mapping[str, Any], trust: bool) -> tuple[dict[str, Any], list[Replaced]]:
    """Adapt a configuration to a CPU and to two short steps.

    Args:
        cfg: the raw YAML.
        trust: whether to keep `trust_remote_code`.

    Returns:
        The adapted configuration, and the replaced keys.
    """
    kept, replaced = dict(cfg), []

    def put(key: str, new: Any, why: str, is_exercised: bool = True) -> None:
        replaced.append(Replaced(key, kept.get(key), new, why, is_exercised))
        kept[key] = new
        if new is None:
            del kept[key]

    for key, value in cfg.items():
        if key == "trust_remote_code" and trust:
            continue
        rule = next((rule for rule in _RULES if re.fullmatch(rule.keys, str(key)) and rule.applies(value)), None)
        if rule:
            put(key, rule.new, rule.why, is_exercised=False)
    if kept.get("adapter") == "qlora":
        put("adapter", "lora", "4-bit weights need a GPU", is_exercised=False)
    if any(_PLUGINS.search(str(name)) for name in kept.get("plugins") or []):
        put("plugins", [name for name in kept["plugins"] if not _PLUGINS.search(str(name))], _KERNEL, False)
    checkpointing = kept.get("gradient_checkpointing")
    if isinstance(checkpointing, str) and checkpointing.startswith("offload"):
        put("gradient_checkpointing", True, _GPU, is_exercised=False)
    for key, most in _LARGEST.items():
        if isinstance(value := kept.get(key), int) and not isinstance(value, bool) and value > most:
            put(key, most, "a short step")
    kept |= {"bf16": False, "fp16": False, "tf32": False, "max_steps": 2, "logging_steps": 1}
    return kept, replaced


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

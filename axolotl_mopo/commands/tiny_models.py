"""Build tiny models with random weights that replace those of a configuration."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

_SIZES = {
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "n_inner": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "n_head": 4,
    "head_dim": 16,
    "global_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_layers": 2,
}
"""Sizes of a shrunk model, by the names that model configurations use. No size is increased."""


def byte_tokenizer(extra: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """A tokenizer with one token per byte and ChatML's template.

    Args:
        extra: tokens to add, which the configuration expects.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[2],
        additional_special_tokens=_SPECIAL[1:2],
        chat_template=CHATML,
    )
    tokenizer.add_tokens([token for token in dict.fromkeys(extra) if token], special_tokens=True)
    return tokenizer


def load_tokenizer(source: str, *, trust: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder or of a model of the hub.

    Raises:
        OSError, ValueError: if there is none.
    """
    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust)


def load_architecture(source: str, *, trust: bool) -> PretrainedConfig:
    """Load the configuration of a model in a folder or of the hub.

    Raises:
        OSError, ValueError: if there is none, or it needs its own code.
    """
    return AutoConfig.from_pretrained(source, trust_remote_code=trust)


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture with two narrow layers, or one narrow layer of each kind."""
    small = copy.deepcopy(config)
    for name in ("quantization_config", "auto_map"):
        if hasattr(small, name):
            delattr(small, name)
    for part in _parts(small):
        _shrink(part)
    return small


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configuration itself and those nested in it, such as the text and vision parts."""
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(part for each in inner for part in _parts(each))]


def _shrink(config: PretrainedConfig) -> None:
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    kinds = vars(config).get("layer_types")
    for name, size in _SIZES.items():
        if isinstance(value := vars(config).get(name), int):
            setattr(config, name, min(value, size))
    if isinstance(groups, int) and isinstance(heads, int):
        config.num_key_value_heads = 4 if groups == heads else min(groups, 2)
    if isinstance(kinds, list) and kinds and len(kinds) == layers:
        kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        kept += [index for index in range(len(kinds)) if index not in kept][: max(0, 2 - len(kept))]
        config.layer_types = [kinds[index] for index in sorted(kept)]
        config.num_hidden_layers = len(kept)
    _fit_rope(config)


def _fit_rope(config: PretrainedConfig) -> None:
    """Truncate the lists of rotary scaling factors to the length that the narrow heads need."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping):
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = int(width * (rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1)) // 2
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = rope[name][:pairs]  # type: ignore[index]


def fallback_architecture() -> PretrainedConfig:
    """A tiny Llama."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        bos_token_id=None,
    )


def build(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build a model with random weights for a tokenizer.

    Raises:
        Exception: any exception, if sizes do not fit together.
    """
    config = copy.deepcopy(config)
    for part in _parts(config):
        if "vocab_size" in vars(part):
            part.vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(part, name, getattr(tokenizer, name))
    config.dtype = torch.float32
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model(input_ids=torch.tensor([[1, 2, 3]]))  # sizes that do not fit together fail here
    if model.generation_config is not None:  # the sampling settings of the large model do not apply
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model and its tokenizer in a folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(base: Path, folder: Path, seed: int, beta: float | None = None) -> None:
    """Save a LoRA adapter that changes the model in `base` a little, with a `mopo.json` if a beta is given."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(str(folder))
    if beta is not None:
        (folder / "mopo.json").write_text(json.dumps({"method": "modpo", "beta": beta}), encoding="utf-8")


def save_reward_model(folder: Path, tokenizer: PreTrainedTokenizerBase, labels: Mapping[int, str], seed: int) -> None:
    """Save a tiny sequence classifier with one score per label."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16384,
        id2label=dict(labels),
        label2id={label: index for index, label in labels.items()},
        pad_token_id=tokenizer.pad_token_id,
    )
    save(AutoModelForSequenceClassification.from_config(config), tokenizer, folder)

"""Prompts and completions in the published shapes of the common chat formats: one BOS, a header, an end of turn."""

import copy

import pytest

from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.tokenizing import tokenize

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_2_5 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# family: template, BOS, EOS, end of turn, the prompt of the conversation below, its completion
FAMILIES = {
    "llama-3": (
        LLAMA_3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Because.<|eot_id|>",
    ),
    "qwen-2.5": (
        QWEN_2_5,
        None,
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
    ),
    "mistral": (
        MISTRAL,
        "<s>",
        "</s>",
        "</s>",
        "<s>[INST] Hi[/INST] Hello.</s>[INST] Why?[/INST]",
        " Because.</s>",
    ),
    "gemma": (
        GEMMA,
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n",
        "Because.<end_of_turn>",
    ),
    "chatml": (
        CHATML,
        None,
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Because.<|im_end|>",
    ),
}
CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_renders_in_its_published_shape(family, tokenizer):
    template, bos, eos, end_of_turn, prompt, completion = FAMILIES[family]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(
        {
            "eos_token": eos,
            **({"bos_token": bos} if bos else {}),
            "additional_special_tokens": list({"<|im_start|>", end_of_turn}),
        }
    )
    tokenizer.chat_template = template
    renderer = ChatRenderer(tokenizer)
    assert renderer.prompt(CONVERSATION) == prompt
    assert renderer.completion(CONVERSATION, "Because.") == completion
    prompt_ids, completion_ids = tokenize(tokenizer, [prompt, completion])
    if bos:
        assert prompt_ids.count(tokenizer.bos_token_id) == 1
        assert prompt_ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in completion_ids
    assert completion_ids[-1] == tokenizer.convert_tokens_to_ids(end_of_turn)
    assert completion_ids.count(completion_ids[-1]) == 1

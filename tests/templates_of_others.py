"""Chat templates that other packages ship, and tokenizers that have their special tokens.

The templates are read from TRL and Axolotl as installed, and from a newer TRL beside them if `.ci/run` has put one into
`.chat_templates`. Their tokenizers are not here, so a byte-level BPE that merges whitespace and line breaks, as that
of Qwen and Llama does, gets the special tokens that a template writes.
"""

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NEWER = Path(__file__).parent.parent / ".chat_templates" / "trl" / "chat_templates"
_SPECIAL = re.compile(
    "<\\|[^|<>\\s'\"]{1,40}\\|?>|<[a-z_]{1,20}\\|>|<\uff5c[^<>'\"]{1,40}\uff5c>|\\[/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|CALL_ID|ARGS)\\]"
    "|<(?:start_of_turn|end_of_turn|think|/think|end_of_utterance)>"
)
_ENDS = (
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|return|>",
        "<|end|>",
        "<|eot|>",
    ),
    *("<|END_OF_TURN_TOKEN|>", "<turn|>", "<|endoftext|>", "<|user|>"),
)
_WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_CORPUS = ["user\nassistant\n\nsystem\n\n\nThe sun is bigger than the moon.\n\n  \n Why is the sky blue?\n\n\n"] * 50


SHAPES = {
    # SmolLM3: a system message with the mode, thoughts in the content, an empty thought where they are turned off.
    "shape/smollm3": (
        "{% set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}"
        "<|im_start|>system\n## Facts\n\nMode: {{ mode }}\n\n## Wishes\n\n"
        "{{ messages[0]['content'] if messages[0]['role'] == 'system' else 'Help.' }}\n\n"
        "{% if xml_tools %}## Tools\n\n{% for tool in xml_tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
        "<|im_end|>\n{% for m in messages %}"
        "{% if m['role'] == 'user' %}<|im_start|>user\n{{ m['content'] }}<|im_end|>\n"
        "{% elif m['role'] == 'assistant' %}<|im_start|>assistant\n"
        "{% if mode == '/no_think' %}<think>\n\n</think>\n{% endif %}{{ m['content'].lstrip('\n') }}<|im_end|>\n"
        "{% elif m['role'] == 'tool' %}<|im_start|>user\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if mode == '/no_think' %}<think>\n\n</think>\n{% endif %}{% endif %}"
    ),
    # Mistral Small 3.2: no header before an answer, tools before the last question, calls with an id of nine letters.
    "shape/mistral_small": (
        "{{ bos_token }}{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'] }}[/SYSTEM_PROMPT]"
        "{% elif m['role'] == 'user' %}{% if tools and loop.index0 == ns.last %}"
        "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m['content'] }}[/INST]"
        "{% elif m['role'] == 'tool' %}[TOOL_RESULTS]{{ m['tool_call_id'] }}[TOOL_CONTENT]{{ m['content'] }}"
        "[/TOOL_RESULTS]{% elif m['tool_calls'] %}{% for call in m['tool_calls'] %}"
        "{% if call['id'] | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}"
        "[TOOL_CALLS]{{ call['function']['name'] }}[CALL_ID]{{ call['id'] }}[ARGS]"
        "{{ call['function']['arguments'] | tojson }}{% endfor %}{{ eos_token }}"
        "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Templates in the shape of those of models that neither package ships, in our own words."""


def shipped():
    """The text of each template by its name: `trl/qwen3`, `axolotl/llama4`, `shape/smollm3`."""
    trl = NEWER if NEWER.is_dir() else Path(str(files("trl"))) / "chat_templates"
    axolotl = Path(str(files("axolotl"))) / "utils" / "chat_templates" / "templates"
    found = {
        f"{name}/{path.stem}": path
        for name, folder in (("trl", trl), ("axolotl", axolotl))
        for path in folder.glob("*.jinja")
    }
    texts = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    return dict(sorted({**texts, **SHAPES}.items()))


@cache
def _bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer.to_str()


def tokenizer_for(template):
    """A tokenizer with the special tokens of a template, and the template."""
    special = sorted(set(_SPECIAL.findall(template)))
    end = next((token for token in _ENDS if token in special), "</s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()), bos_token="<s>", eos_token=end, additional_special_tokens=special
    )
    tokenizer.chat_template = template
    return tokenizer

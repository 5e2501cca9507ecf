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
    "<\\|[^|<>\\s'\"]{1,40}\\|?>|<[a-z_]{1,20}\\|>|<\uff5c[^<>'\"]{1,40}\uff5c>|\\[/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS)\\]"
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


def shipped():
    """Path of each template by its name: `trl/qwen3`, `axolotl/llama4`."""
    trl = NEWER if NEWER.is_dir() else Path(str(files("trl"))) / "chat_templates"
    axolotl = Path(str(files("axolotl"))) / "utils" / "chat_templates" / "templates"
    found = {f"trl/{path.stem}": path for path in trl.glob("*.jinja")}
    return dict(sorted({**found, **{f"axolotl/{path.stem}": path for path in axolotl.glob("*.jinja")}}.items()))


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

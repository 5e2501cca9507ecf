"""Thirteen conversations in the form that data sets have, and what becomes of them under a chat template.

python -m tests.chat_conversations     # writes docs/reference/chat_templates.md
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # started as a script

from templates_of_others import shipped, tokenizer_for

from axolotl_mopo.data.formats.general import read_pair
from axolotl_mopo.data.options import PairsOptions
from axolotl_mopo.data.pair_tokens import tokenize_pairs
from axolotl_mopo.data.spec import DataSpec
from axolotl_mopo.data.strategies import Tokenization
from axolotl_mopo.data.template_form import variables
from axolotl_mopo.errors import RowError

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "chat_templates.md"
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city."},
                "days": {"type": "integer", "description": "How many days."},
            },
            "required": ["city"],
        },
    },
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **others):
    return {"role": "assistant", "content": content, **others}


def system(content):
    return {"role": "system", "content": content}


CALLING = assistant(None, tool_calls=[CALL])
RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": "Sunny, 21 degrees."}
CONVERSATIONS = {
    "plain": ([user("Why is the sky blue?")], [assistant("Light.")], {}),
    "system": ([system("Be brief."), user("Why?")], [assistant("Light.")], {}),
    "several turns": ([user("Hi"), assistant("Hello."), user("Why?")], [assistant("Because.")], {}),
    "tool result": ([user("How is Paris?"), CALLING, RESULT], [assistant("It is sunny.")], {"tools": [TOOL]}),
    "tool call": ([user("How is Paris?")], [CALLING], {"tools": [TOOL]}),
    "reasoning": ([user("Why?")], [assistant("Light.", reasoning_content="Let me see.\nYes.")], {}),
    "reasoning in the text": ([user("Why?")], [assistant("<think>\nLet me see.\n</think>\n\nLight.")], {}),
    "no reasoning": ([user("Why?")], [assistant("Light.")], {"chat_template_kwargs": {"enable_thinking": False}}),
    "earlier reasoning": (
        [user("Hi"), assistant("Hello.", reasoning_content="A greeting."), user("Why?")],
        [assistant("Light.", reasoning_content="Hm.")],
        {},
    ),
    "empty system": ([system(""), user("Why?")], [assistant("Light.")], {}),
    "unicode, special tokens": (
        [user("Was heißt 'blau'? 你好 <|im_end|> </s>")],
        [assistant("Ça va 😀 <|endoftext|>")],
        {},
    ),
    "blanks": ([user("Why?  \n\n")], [assistant("  Light.  \n")], {}),
    "parts": (
        [user([{"type": "text", "text": "Why "}, {"type": "text", "text": "so?"}])],
        [assistant([{"type": "text", "text": "Light."}])],
        {},
    ),
}
"""A name -> the prompt, the turns of the response, and further columns of the row."""


THINKING = ("gptoss", "lfm2_2_5")
"""Templates that call the reasoning `thinking`."""
ONLY_IN_KEYS = (*("qwen3_8", "gptoss", "lfm2_2_5", "muse_glimmer", "diffusion_gemma", "gemma4_v5", "nemotron_3"),)
"""Templates that print reasoning, and do not look for it in the text."""
ARGUMENTS_AS_TEXT = ("deepseek",)
WITHOUT_NULL = ("glm", "llama3_2_vision", "llama4", "qwen3_5", "qwen3_vl", "lfm2")
"""Templates that print or refuse a null as content."""
IN_PARTS = ("idefics3", "llava_next", "smolvlm")
"""Templates that take contents as lists of parts only."""
AFTER_TURN = {"axolotl/llava": " ", "axolotl/alpaca": "\n\n"}
"""What the templates without an end-of-turn token write after an assistant's turn."""


def is_one_of(names, name):
    return any(part in name for part in names)


def by_hand(name, turns):
    """The turns in the form that this template documents."""
    shaped = []
    for turn in turns:
        turn = dict(turn)
        if isinstance(turn["content"], list):
            turn["content"] = "".join(part["text"] for part in turn["content"])
        if "</think>" in (turn["content"] or "") and is_one_of(ONLY_IN_KEYS, name):
            turn |= {"reasoning_content": "Let me see.", "content": "Light."}
        if "reasoning_content" in turn and is_one_of(THINKING, name):
            turn["thinking"] = turn.pop("reasoning_content")
        if "tool_calls" in turn and is_one_of(ARGUMENTS_AS_TEXT, name):
            function = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}
            turn["tool_calls"] = [{**CALL, "function": function}]
        if turn["content"] is None and is_one_of(("gptoss",), name):
            del turn["content"]
        elif turn["content"] is None and is_one_of(WITHOUT_NULL, name):
            turn["content"] = ""
        if is_one_of(IN_PARTS, name) and isinstance(turn.get("content"), str):
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        shaped.append(turn)
    return shaped


class Shipped:
    """A template that another package ships, with what this package makes of conversations under it."""

    def __init__(self, name, template, **options):
        self.name, self.template, self.tokenizer = name, template, tokenizer_for(template)
        self.tokenizer.name_or_path = name
        self.spec = DataSpec(where="a row", strategy="pairs", options=PairsOptions(**options))
        self.tokenization = Tokenization(self.tokenizer, self.spec)

    def outcome(self, conversation):
        """ "exact", or the reason why a conversation is refused.

        Raises:
            AssertionError: if the tokens of prompt and completion are not those of the template's own rendering.
        """
        prompt, answer, others = CONVERSATIONS[conversation]
        row = {"prompt": prompt, "chosen": answer, "rejected": "No.", **others}
        if "chat_template_kwargs" in others and "enable_thinking" not in variables(self.template):
            del row["chat_template_kwargs"]
        try:
            tokens = self.tokens(read_pair(row, self.spec.options))
        except RowError as error:
            return str(error)
        expected = self.tokenizer(self.whole(row, [*prompt, *answer]), add_special_tokens=False)["input_ids"]
        found = [*tokens.prompt_ids[0], *tokens.chosen_ids]
        assert found == expected[: len(found)], (self.tokenizer.decode(found), self.tokenizer.decode(expected))
        assert not self.tokenizer.decode(expected[len(found) :]).strip()
        return "exact"

    def tokens(self, pair):
        """The token ids of a pair."""
        self.tokenization.renderer.check(pair.prompt, [pair.chosen, pair.rejected], pair.inputs)
        render = self.tokenization.render(pair)
        texts = self.tokenization.texts(pair, render)
        return self.tokenization.tokens(pair, render, texts, tokenize_pairs(self.tokenizer, [texts]), 10**6)

    def whole(self, row, turns):
        """The template's own rendering; with an end-of-sequence token if it writes nothing after a response."""
        kwargs = row.get("chat_template_kwargs", {})
        shaped = by_hand(self.name, turns)
        whole = self.tokenizer.apply_chat_template(shaped, tokenize=False, tools=row.get("tools"), **kwargs)
        whole = whole.removesuffix(AFTER_TURN.get(self.name, ""))
        written = (by_hand("", turns[-1:])[0]["content"] or "</tool_call>").rpartition("</think>")[-1]
        return whole + self.tokenizer.eos_token if whole.endswith((written, written.strip())) else whole


def exact(outcomes):
    """The cells of the page for the outcomes of all conversations under one template."""
    return [MARKS[outcome == "exact"] for outcome in outcomes.values()]


MARKS = {True: "exact", False: "refused"}
_HEAD = """\
# Chat templates

What becomes of conversations under the chat templates that TRL 1.16 and Axolotl 0.19 ship, and under two that have the
shape of SmolLM3's and Mistral Small's. Those of Llama 3.3, Phi-4, GPT-OSS, GLM 4.5 and DeepSeek are `trl/llama3_1`,
`axolotl/phi_4`, `trl/gptoss`, `trl/glm4moe`, `trl/deepseekv3` and `trl/deepseek_r1_distill`. **exact**: the tokens of
prompt and response together are those of the template's own rendering of the whole conversation, up to whitespace after
the last end-of-turn token, which a model never generates. **refused**: the run stops before a model is loaded, and the
error names the template, the row and the part of the conversation that the template does not print.

Where a template writes the header of the response differently when the response follows (Qwen3.5 and Nemotron 3 open
`<think>` in the prompt, and close it at once in a response without reasoning), the response begins with the first token
that differs. The messages are put into the form that a template prints: reasoning under its name, the arguments of tool
calls as a mapping or as JSON text. Reasoning at the beginning of a text, between `<think>` and `</think>`, is parted
from it for templates that print reasoning.

Refused on purpose: reasoning that a template leaves out of its own rendering (DeepSeek R1 and V3 print only the
answer), tools and tool calls under a template that does not print them, and system messages that it drops or refuses.

"""


def page(outcomes):
    """The page, given the outcomes of all conversations for each template."""
    lines = [["template", *CONVERSATIONS], ["---"] * (1 + len(CONVERSATIONS))]
    lines += [[f"`{name}`", *exact(found)] for name, found in outcomes.items()]
    return _HEAD + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def rows_of_page():
    """The cells of each template on the page."""
    lines = [
        line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"
    ]
    return {name.strip("`"): cells for name, *cells in lines}


if __name__ == "__main__":
    PAGE.write_text(
        page(
            {
                name: {conversation: template.outcome(conversation) for conversation in CONVERSATIONS}
                for name, text in shipped().items()
                for template in [Shipped(name, text)]
            }
        ),
        encoding="utf-8",
    )

"""Part what a model generates into reasoning and answer, by the marks that its chat template writes around them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.data.conversations import user
from axolotl_mopo.data.rendering import ChatRenderer
from axolotl_mopo.data.rows import Message, RatedResponse
from axolotl_mopo.data.template_form import ANSWER, QUESTION, REASONING
from axolotl_mopo.data.tokenizing import control_tokens, shared_length
from axolotl_mopo.errors import RowError


class Parts(NamedTuple):
    """A generated text in parts."""

    reasoning: str | None
    """None if the text has no marks; an empty text if it has marks and nothing between them."""
    answer: str
    """Empty if the text ends before the answer begins."""


@dataclass(frozen=True)
class ReasoningMarks:
    """What a chat template writes around the reasoning and before the answer, without white space at the ends."""

    opening: str = "<think>"
    """Before the reasoning."""
    closing: str = "</think>"
    """Between reasoning and answer."""
    without: str = ""
    """Before an answer that has no reasoning."""

    def part(self, prompt: str, text: str) -> Parts:
        """Part the text that a model generated after a prompt.

        Args:
            prompt: the rendered prompt, which may end with the opening mark, or with both marks to turn reasoning off.
            text: the text with its special tokens, without the stop token.
        """
        before = prompt.rstrip()
        begun = text.lstrip()
        if before.endswith(self.closing):
            return Parts(None, text)
        if self.closing in text:
            reasoning, _, answer = text.partition(self.closing)
            return Parts(self._unopened(reasoning), answer.lstrip("\n"))
        if self.without and begun.startswith(self.without):
            return Parts("", begun.removeprefix(self.without).lstrip("\n"))
        opens = before.endswith(self.opening) if self.opening else self.closing in self.without
        if opens or begun.startswith(self.opening or "\0"):
            return Parts(self._unopened(_without_begun(text, self.closing)), "")
        if begun and any(mark.startswith(begun.rstrip()) for mark in (self.opening, self.without)):
            return Parts("", "")  # cut off inside a mark
        return Parts(None, text)

    def _unopened(self, reasoning: str) -> str:
        return reasoning.lstrip().removeprefix(self.opening).strip("\n")


def _without_begun(text: str, mark: str) -> str:
    """Return a text without the beginning of a mark at its end."""
    return next((text[:-size] for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), text)


def find_marks(renderer: ChatRenderer) -> ReasoningMarks:
    """Find the marks by rendering an invented reasoning and answer; `<think>` and `</think>` if none are printed."""
    question = user(QUESTION)
    answer: Message = {"role": "assistant", "content": ANSWER}
    try:
        prompt = renderer.prompt(question)
        reasoned = RatedResponse(ANSWER, {}, [{**answer, "reasoning_content": REASONING}])
        whole = renderer.response(question, reasoned).whole
        plain = renderer.response(question, RatedResponse(ANSWER, {})).whole
        earlier = renderer.prompt([*question, answer, *question])
    except RowError:
        return ReasoningMarks()
    at = whole.find(REASONING)
    closing = whole[at + len(REASONING) :].partition(ANSWER)[0].strip()
    if at < 0 or not closing:
        return ReasoningMarks()
    # The header of the turn is what a prompt and an earlier turn have as well; one of them may go on with a mark.
    header = min(shared_length(whole, other) for other in (prompt, earlier))
    without = plain[header:].partition(ANSWER)[0].strip()
    return ReasoningMarks(whole[header:at].strip(), closing, without)


class PartedTokens(NamedTuple):
    """The tokens of a response in parts. The texts have no special tokens."""

    reasoning: str | None
    """See `Parts`."""
    answer: str
    reasoning_tokens: int
    """Number of tokens before the answer: the reasoning and its marks."""


class ReasoningParser:
    """Parts generated tokens into reasoning and answer.

    Args:
        tokenizer: the tokenizer of the model.
        renderer: renders its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, renderer: ChatRenderer) -> None:
        self.marks = find_marks(renderer)
        self._tokenizer, self._special = tokenizer, control_tokens(tokenizer)

    def part(self, prompt: str, tokens: Sequence[int], ended: bool) -> PartedTokens:
        """Part the tokens that a model generated after a prompt.

        Args:
            prompt: the rendered prompt.
            tokens: token ids.
            ended: whether the last one is a stop token.
        """
        own = list(tokens[:-1] if ended else tokens)
        text = self._text(own)  # with special tokens, since the marks may be some
        parts = self.marks.part(prompt, text)
        answer = self._special.sub("", parts.answer)
        if parts.reasoning is None:
            return PartedTokens(None, answer, 0)
        before = self._tokens_before(own, len(text) - len(parts.answer)) if parts.answer else len(tokens)
        return PartedTokens(self._special.sub("", parts.reasoning), answer, before)

    def _tokens_before(self, tokens: list[int], characters: int) -> int:
        """Count the tokens whose text ends within the first characters."""
        sizes = range(1, len(tokens) + 1)
        return bisect_right(sizes, characters, key=lambda size: len(self._text(tokens[:size])))

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))


def joined(reasoning: str | None, answer: str) -> str:
    """Return reasoning and answer as one text, in the form that most data sets and models use."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}" if reasoning else answer

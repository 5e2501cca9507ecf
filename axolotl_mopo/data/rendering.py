"""Render conversations with the tokenizer's chat template, and find the parts of a response that are trained on."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.choices import Completion, Turns
from axolotl_mopo.data.chat_templates import check_chat_template
from axolotl_mopo.data.rows import NO_INPUTS, Message, RatedResponse, TemplateInputs
from axolotl_mopo.data.template_form import find_form, part_reasoning, probes, renamed
from axolotl_mopo.data.tokenizing import shared_length
from axolotl_mopo.errors import DataError, RowError

Span = tuple[int, int]
"""A range, end excluded."""

_PROBE = "Zyzzyva"
_SHOWN = 40


@dataclass(frozen=True)
class RenderedResponse:
    """A conversation with a response, as the chat template renders it."""

    whole: str
    """The text, up to and including the last end-of-turn token."""
    start: int
    """Where the response begins: the number of characters that the text shares with the prompt."""
    spans: list[Span]
    """Ranges of characters that are trained on, in order."""


class ChatRenderer:
    """Renders prompts, and conversations with a response.

    Args:
        tokenizer: a tokenizer with a chat template.
        kwargs: variables of the template (`chat_template_kwargs` of the YAML); those of a row take precedence.

    Raises:
        DataError: if the tokenizer has no usable chat template, or the template does not read one of the variables.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; set `chat_template:` in the YAML, for example to chatml"
            )
        self._tokenizer, self._kwargs = tokenizer, dict(kwargs or {})
        self._refusals: dict[str, str | None] = {}
        try:
            self._check_kwargs(self._kwargs, ())
            self.form = find_form(lambda turns: render_chat(tokenizer, turns, kwargs=self._kwargs))
            ending = self._render([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": _PROBE}])
        except RowError as error:
            raise DataError(str(error)) from None
        if _PROBE not in ending:
            raise DataError("the chat template leaves out the assistant's response; choose another `chat_template:`")
        ending = ending[ending.rindex(_PROBE) + len(_PROBE) :]
        self._after_turn = ending[len(ending.rstrip()) :]
        """Whitespace after the end-of-turn token, which is not part of the response."""
        self._end_of_turn = ending.strip()
        self._missing_end = "" if self._end_of_turn else tokenizer.eos_token or ""

    def prompt(self, messages: Sequence[Message], inputs: TemplateInputs = NO_INPUTS) -> str:
        """Render a conversation including the header of the assistant turn that follows."""
        return self._render(messages, inputs, add_generation_prompt=True)

    def completion(self, messages: Sequence[Message], response: str) -> str:
        """Render the text after the prompt if the assistant answers `response`, including the end-of-turn token.

        Raises:
            RowError: see `response`.
        """
        rendered = self.response(messages, RatedResponse(response, {}))
        return rendered.whole[rendered.start :]

    def response(
        self,
        messages: Sequence[Message],
        response: RatedResponse,
        inputs: TemplateInputs = NO_INPUTS,
        completion: Completion = "all",
        turns: Turns = "all",
    ) -> RenderedResponse:
        """Render a conversation with a response.

        Each assistant turn begins where the rendering of the turns before it, with the header of an assistant turn,
        stops to agree with the whole. A template may write the header itself differently if a turn follows (without an
        opened `<think>`, for example), but not the turns before it.

        Args:
            messages: the prompt.
            response: the response.
            inputs: what else the template reads.
            completion, turns: what is trained on.

        Raises:
            RowError: if the template renders the turns before an assistant turn differently when it follows, or
                changes what is trained on.
        """
        own = response.messages
        conversation = [*messages, *own]
        whole = self._ended(conversation, inputs)
        start = self._start(messages, inputs, whole)
        spans = []
        for number in range(len(messages), len(conversation)):
            is_last = number == len(conversation) - 1
            if conversation[number]["role"] == "assistant" and (is_last or turns == "all"):
                first = self._start(conversation[:number], inputs, whole)
                end = len(whole) if is_last else self._end(conversation, number, inputs, whole, first)
                self._check_printed(conversation[number], whole[first:end])
                if completion == "answer":
                    first = max(first, self._answer_start(conversation, number, inputs, whole))
                spans.append((first, end))
        return RenderedResponse(whole, start, spans)

    def check(
        self,
        prompt: Sequence[Message],
        responses: Iterable[RatedResponse],
        inputs: TemplateInputs,
        turns: Turns = "all",
    ) -> None:
        """Render conversations of this shape, once for each shape, with other texts.

        Raises:
            RowError: if the template refuses the shape, or leaves out a part of it.
        """
        for response in responses:
            conversation = [*prompt, *response.messages]
            shape = (
                [_shape(turn) for turn in conversation],
                sorted(inputs.kwargs.items()),
                list(map(_name, inputs.tools)),
            )
            key = json.dumps([*shape, len(prompt), turns], default=str)
            if key not in self._refusals:
                self._refusals[key] = None
                try:
                    self._check_kwargs(inputs.kwargs, inputs.tools)
                    self._check_parts(conversation, len(prompt), inputs, turns)
                except RowError as error:
                    self._refusals[key] = str(error)
            if refusal := self._refusals[key]:
                raise RowError(refusal, "refused by the chat template")

    def check_prompt(self, prompt: Sequence[Message], inputs: TemplateInputs) -> None:
        """Render a prompt of this shape with other texts.

        Raises:
            RowError: if the template refuses it, leaves out a part of it, or does not read one of the inputs.
        """
        self._check_kwargs(inputs.kwargs, inputs.tools)
        invented = list(probes(prompt))
        asked = [turn for turn, _ in invented]
        text = self.prompt(asked, self._with_invented_tools(asked, inputs))
        for turn, words in invented:
            # Templates leave out the reasoning of earlier turns on purpose.
            for word in (each for each in words if each != turn.get("reasoning_content")):
                if word not in text:
                    raise self._left_out(turn, word, prompt)

    def _check_parts(
        self, conversation: Sequence[Message], prompt_turns: int, inputs: TemplateInputs, turns: Turns
    ) -> None:
        invented = list(probes(conversation))
        asked = [turn for turn, _ in invented[:prompt_turns]]
        inputs = self._with_invented_tools(asked, inputs)
        prompt, whole = self.prompt(asked, inputs), self._ended([turn for turn, _ in invented], inputs)
        answered = whole[self._start(asked, inputs, whole) :]
        for number, (turn, words) in enumerate(invented):
            for word in words:
                # Templates leave out the reasoning of earlier turns on purpose.
                is_thought = word == turn.get("reasoning_content")
                is_earlier = number < prompt_turns or (turns == "last" and number < len(invented) - 1)
                if word not in (prompt if number < prompt_turns else answered) and not (is_thought and is_earlier):
                    raise self._left_out(turn, word, conversation, "" if number == len(invented) - 1 else _OR_LAST)

    def _with_invented_tools(self, asked: Sequence[Message], inputs: TemplateInputs) -> TemplateInputs:
        """Give the tools other names, and check that the template prints them."""
        if not inputs.tools:
            return inputs
        names = [f"okapi_{number}" for number in range(len(inputs.tools))]
        inputs = replace(inputs, tools=list(map(renamed, inputs.tools, names)))
        if any(name not in self.prompt(asked, inputs) for name in names):
            raise RowError(
                f"{self._named} does not print `tools`; remove them from the row, or choose another `chat_template:`"
            )
        return inputs

    def _left_out(self, turn: Message, word: str, conversation: Sequence[Message], hint: str = "") -> RowError:
        part = next((key for key in ("content", "reasoning_content") if turn.get(key) == word), "tool_calls")
        return RowError(
            f"{self._named} leaves out the {_PARTS[part]} of a turn of role {turn['role']} in a conversation of the "
            f"roles {', '.join(each['role'] for each in conversation)}; choose another `chat_template:`{hint}"
        )

    def _start(self, before: Sequence[Message], inputs: TemplateInputs, whole: str) -> int:
        """Return where the turn after some turns begins in the rendering of a whole conversation."""
        prompt = self.prompt(before, inputs)
        if whole.startswith(prompt):
            return len(prompt)
        turns = self._render(before, inputs)
        if not (whole.startswith(turns) and prompt.startswith(turns)):
            raise self._rewritten(prompt, whole, "a response")
        return shared_length(prompt, whole)

    def _end(self, conversation: Sequence[Message], number: int, inputs: TemplateInputs, whole: str, first: int) -> int:
        """Return where a turn that others follow ends in the rendering of a whole conversation.

        A template may render the last turn differently, with an empty thought for example. Then the turn ends with the
        last end-of-turn token before the content of the next turn.
        """
        until = self._render(conversation[: number + 1], inputs).removesuffix(self._after_turn)
        if whole.startswith(until):
            return len(until)
        following = self._with_content(conversation, number + 1, self._other_than(conversation[number + 1]["content"]))
        end = whole.rfind(self._end_of_turn, first, shared_length(whole, self._ended(following, inputs)))
        if not self._end_of_turn or end < 0:
            raise self._rewritten(until, whole, "another turn")
        return end + len(self._end_of_turn)

    def _check_printed(self, turn: Message, printed: str) -> None:
        for text in (self.form.text(turn), turn.get("reasoning_content") or ""):
            if text.strip() not in printed:
                raise RowError(
                    f"{self._named} changes or leaves out a part of the response, {text.strip()!r:.80}; choose another "
                    "`chat_template:`, or `turns: last` if it is in an earlier turn",
                    "changed by the chat template",
                )

    def _answer_start(self, conversation: Sequence[Message], number: int, inputs: TemplateInputs, whole: str) -> int:
        """Return where the answer of an assistant turn begins, after its reasoning: where another answer differs."""
        content = conversation[number]["content"] or ""
        thoughts, answer = part_reasoning(content)
        kept = content.removesuffix(answer) if thoughts else ""
        other = self._with_content(conversation, number, f"{kept}{self._other_than(answer)}")
        return shared_length(whole, self._ended(other, inputs))

    @staticmethod
    def _with_content(conversation: Sequence[Message], number: int, content: str) -> list[Message]:
        return [*conversation[:number], {**conversation[number], "content": content}, *conversation[number + 1 :]]

    @staticmethod
    def _other_than(text: str | None) -> str:
        """Return a text that begins with another letter."""
        return "Quokka" if (text or "").lstrip()[:1] == _PROBE[0] else _PROBE

    def _ended(self, messages: Sequence[Message], inputs: TemplateInputs) -> str:
        return self._render(messages, inputs).removesuffix(self._after_turn) + self._missing_end

    def _render(
        self,
        messages: Sequence[Message],
        inputs: TemplateInputs = NO_INPUTS,
        add_generation_prompt: bool = False,
    ) -> str:
        shaped = [self.form.shaped(turn) for turn in messages]
        kwargs = {**self._kwargs, **inputs.kwargs}
        return render_chat(self._tokenizer, shaped, add_generation_prompt, inputs.tools, kwargs)

    def _check_kwargs(self, kwargs: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> None:
        template = self._tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None)
        own = signature(self._tokenizer.apply_chat_template).parameters
        for name in kwargs:
            if name in own or name == "messages":
                raise RowError(
                    f"`chat_template_kwargs` must not have `{name}`, which is set by this package; remove it"
                )
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise RowError(
                    f"{self._named} does not read `{name}`, so it has no effect in `chat_template_kwargs`; remove it"
                )

    @property
    def _named(self) -> str:
        return f"the chat template of {self._tokenizer.name_or_path or 'the tokenizer'}"

    def _rewritten(self, expected: str, found: str, what: str) -> RowError:
        at = shared_length(expected, found)
        return RowError(
            f"{self._named} renders the turns before {what} differently if it follows: {expected[at:][:_SHOWN]!r} "
            f"becomes {found[at:][:_SHOWN]!r}; so the tokens of the response cannot be separated. Choose another "
            "`chat_template:`, or remove what it rewrites, such as the reasoning of earlier turns",
            "rewritten by the chat template",
        )


_OR_LAST = ", or set `turns: last` if it is the reasoning of an earlier turn"
_PARTS = {"content": "content", "reasoning_content": "reasoning", "tool_calls": "tool calls"}


def _shape(turn: Message) -> list[Any]:
    content = turn["content"]
    thinks = "</think>" in (content or "")
    return [turn["role"], bool(content), thinks, "reasoning_content" in turn, len(turn.get("tool_calls", ()))]


def _name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation with the tokenizer's chat template.

    Raises:
        RowError: if the template refuses the conversation, cannot be rendered, or takes too much time or memory.
    """
    conversation = list(messages)
    inputs: dict[str, Any] = {**(kwargs or {}), "tools": list(tools) or None}

    def render() -> str:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **inputs
        )
        assert isinstance(text, str)  # noqa: S101 (tokenize=False)
        return text

    try:
        check_chat_template(f"{add_generation_prompt} {bool(tools)} {tokenizer.chat_template!r}", render)
        return render()
    except Exception as error:  # untrusted templates may raise anything
        roles = ", ".join(str(message.get("role")) for message in conversation)
        raise RowError(
            f"the chat template refuses a conversation of the roles {roles}: {str(error) or repr(error)}"
        ) from None

"""Render conversations with the tokenizer's chat template, and find the parts of a response that are trained on."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.choices import Completion, Turns
from axolotl_mopo.data.chat_templates import check_chat_template
from axolotl_mopo.data.rows import NO_INPUTS, Message, RatedResponse, TemplateInputs, is_text
from axolotl_mopo.data.template_form import (
    ANSWER,
    QUESTION,
    TemplateForm,
    find_form,
    part_reasoning,
    probes,
    renamed,
    variables,
)
from axolotl_mopo.data.tokenizing import shared_length
from axolotl_mopo.errors import DataError, RowError

Span = tuple[int, int]
"""A range, end excluded."""

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
        self._checked: set[str] = set()
        self._forms: dict[bool, TemplateForm] = {}
        try:
            self._check_kwargs(self._kwargs, ())
            ending = self._render([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": ANSWER}])
        except RowError as error:
            raise DataError(str(error)) from None
        if ANSWER not in ending:
            raise DataError("the chat template leaves out the assistant's response; choose another `chat_template:`")
        ending = ending[ending.rindex(ANSWER) + len(ANSWER) :]
        self._after_turn = ending[len(ending.rstrip()) :]
        """Whitespace after the end-of-turn token, which is not part of the response."""
        self._end_of_turn = ending.strip()
        self._missing_end = "" if self._end_of_turn else tokenizer.eos_token or ""

    def form(self, inputs: TemplateInputs = NO_INPUTS) -> TemplateForm:
        """Return the form in which the template takes messages; a tokenizer may have another template for tools."""
        with_tools = bool(inputs.tools) and isinstance(self._tokenizer.chat_template, Mapping)
        if with_tools not in self._forms:
            tools = inputs.tools if with_tools else ()

            def rendered(turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
                return render_chat(self._tokenizer, turns, add_generation_prompt, tools, self._kwargs)

            self._forms[with_tools] = find_form(rendered)
        return self._forms[with_tools]

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
        prompt: str | None = None,
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
            prompt: the prompt as `prompt` renders it, if it is at hand.

        Raises:
            RowError: if the template renders the turns before an assistant turn differently when it follows, changes
                what is trained on, or prints nothing that is.
        """
        own = response.messages
        conversation = [*messages, *own]
        whole = self._ended(conversation, inputs)
        start = self._start(messages, inputs, whole, prompt)
        spans = []
        for number in range(len(messages), len(conversation)):
            is_last = number == len(conversation) - 1
            if conversation[number]["role"] == "assistant" and (is_last or turns == "all"):
                is_first = number == len(messages)
                first = start if is_first else self._start(conversation[:number], inputs, whole)
                end = len(whole) if is_last else self._end(conversation, number, inputs, whole, first)
                self._check_printed(conversation[number], inputs, whole[first:end])
                if completion == "answer":
                    first = max(first, self._answer_start(conversation, number, inputs, whole, first))
                if first >= end:
                    raise RowError(
                        f"{self._named} prints nothing of a turn of role assistant that could be trained on; leave the "
                        "row out",
                        "nothing to train on",
                    )
                spans.append((first, end))
        return RenderedResponse(whole, start, spans)

    def check(
        self,
        prompt: Sequence[Message],
        responses: Iterable[RatedResponse],
        inputs: TemplateInputs,
        turns: Turns = "all",
    ) -> None:
        """Render conversations of this shape with other texts, to find what the template leaves out.

        Texts alone are rendered once for each shape. What else there is may be refused for its values, so a
        conversation with it is rendered for every row.

        Raises:
            RowError: if the template refuses the conversation, or leaves out a part of it.
        """
        for response in responses:
            try:
                self._check(prompt, response, inputs, turns)
            except RowError as error:
                raise RowError(str(error), "refused by the chat template") from None

    def _check(self, prompt: Sequence[Message], response: RatedResponse, inputs: TemplateInputs, turns: Turns) -> None:
        conversation = [*prompt, *response.messages]
        if inputs.to_row() or not all(map(_is_plain, conversation)):
            self._check_kwargs(inputs.kwargs, inputs.tools)
            self._check_parts(conversation, len(prompt), inputs, turns)
            self.response(prompt, response, inputs, turns=turns)
            return
        shape = [[turn["role"] for turn in conversation], [bool(turn["content"]) for turn in conversation]]
        key = json.dumps([*shape, len(prompt), turns])
        if key not in self._checked:
            self._check_parts(conversation, len(prompt), inputs, turns)
            self._checked.add(key)

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

    def _start(self, before: Sequence[Message], inputs: TemplateInputs, whole: str, prompt: str | None = None) -> int:
        """Return where the turn after some turns begins in the rendering of a whole conversation."""
        prompt = self.prompt(before, inputs) if prompt is None else prompt
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
        changed = self._other_than(conversation[number + 1]["content"])
        following = self._changed(conversation, number + 1, content=changed)
        end = whole.rfind(self._end_of_turn, first, shared_length(whole, self._ended(following, inputs)))
        if not self._end_of_turn or end < 0:
            raise self._rewritten(until, whole, "another turn")
        return end + len(self._end_of_turn)

    def _check_printed(self, turn: Message, inputs: TemplateInputs, printed: str) -> None:
        for text in (self.form(inputs).text(turn), turn.get("reasoning_content") or ""):
            if text.strip() not in printed:
                raise RowError(
                    f"{self._named} changes or leaves out a part of the response, {text.strip()!r:.80}; choose another "
                    "`chat_template:`, or `turns: last` if it is in an earlier turn",
                    "changed by the chat template",
                )

    def _answer_start(
        self, conversation: Sequence[Message], number: int, inputs: TemplateInputs, whole: str, first: int
    ) -> int:
        """Return where the answer of an assistant turn begins, after its reasoning: where another answer differs.

        A template may print tool calls before the content, or no content beside them. Then the answer begins where the
        turn goes on as it does without its reasoning.
        """
        turn = conversation[number]
        content = turn["content"] or ""
        _, answer = part_reasoning(content, self.form(inputs).parts_unopened) or ("", content)
        other = f"{content.removesuffix(answer)}{self._other_than(answer)}"
        differs = self._shared(conversation, number, inputs, whole, content=other)
        if not turn.get("tool_calls"):
            return differs
        calls = [renamed(call, self._other_than(call["function"]["name"])) for call in turn["tool_calls"]]
        if differs <= self._shared(conversation, number, inputs, whole, tool_calls=calls):
            return differs
        if not turn.get("reasoning_content"):
            return first
        without = self._ended(self._changed(conversation, number, reasoning_content=""), inputs)
        return len(whole) - shared_length(whole[::-1], without[::-1])

    def _shared(
        self, conversation: Sequence[Message], number: int, inputs: TemplateInputs, whole: str, **parts: Any
    ) -> int:
        """Return how much of the whole remains with other parts of a turn; all of it if the template refuses them."""
        try:
            return shared_length(whole, self._ended(self._changed(conversation, number, **parts), inputs))
        except RowError:
            return len(whole)

    @staticmethod
    def _changed(conversation: Sequence[Message], number: int, **parts: Any) -> list[Message]:
        return [*conversation[:number], {**conversation[number], **parts}, *conversation[number + 1 :]]

    @staticmethod
    def _other_than(text: str | None) -> str:
        """Return a text that begins with another letter."""
        return ANSWER if (text or "").lstrip()[:1] == QUESTION[0] else QUESTION

    def _ended(self, messages: Sequence[Message], inputs: TemplateInputs) -> str:
        return self._render(messages, inputs).removesuffix(self._after_turn) + self._missing_end

    def _render(
        self,
        messages: Sequence[Message],
        inputs: TemplateInputs = NO_INPUTS,
        add_generation_prompt: bool = False,
    ) -> str:
        form = self.form(inputs)
        shaped = [form.shaped(turn) for turn in messages]
        kwargs = {**self._kwargs, **inputs.kwargs}
        return render_chat(self._tokenizer, shaped, add_generation_prompt, inputs.tools, kwargs)

    def _check_kwargs(self, kwargs: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> None:
        own = {
            "messages",
            *signature(self._tokenizer.apply_chat_template).parameters,
            *self._tokenizer.special_tokens_map,
        }
        if taken := [name for name in kwargs if name in own]:
            raise RowError(f"`chat_template_kwargs` must not have `{taken[0]}`, which has a value already; remove it")
        if kwargs:
            template = self._tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None)
            read = variables(template)
            if unread := [name for name in kwargs if name not in read]:
                raise RowError(
                    f"{self._named} does not read `{unread[0]}`, so it has no effect in `chat_template_kwargs`; remove "
                    "it"
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


def _is_plain(turn: Message) -> bool:
    return is_text(turn) and turn["role"] != "tool" and "</think>" not in turn["content"]


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

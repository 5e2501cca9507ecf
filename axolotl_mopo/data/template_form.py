"""The form in which a chat template takes the parts of a message.

Templates agree on `role`, and differ in the rest: content as a text or as a list of parts, the name of the reasoning,
arguments of tool calls as a mapping or as JSON text. A template is tried with all of them, and messages are put into
the first form that it prints.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from axolotl_mopo.data.rows import Message
from axolotl_mopo.data.tool_calls import with_arguments
from axolotl_mopo.errors import RowError

Render = Callable[[Sequence[Message]], str]
"""Renders messages as they are; raises a RowError if the template refuses them."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of an assistant's reasoning, in data sets and in chat templates."""

_THOUGHTS = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
_QUESTION, _ANSWER, _REASONING, _FUNCTION = "Zyzzyva", "Quokka", "Wombat", "numbat"
_CALL = {
    "id": "call12345",  # some templates accept only nine letters and digits
    "type": "function",
    "function": {"name": "find_animal", "arguments": {"kind": "Okapi"}},
}


def part_reasoning(text: str) -> tuple[str, str]:
    """Part a text with reasoning before `</think>` into reasoning and answer; the reasoning is empty if there is none.

    The opening `<think>` may be missing, since some chat templates end the prompt with it.
    """
    found = _THOUGHTS.fullmatch(text)
    return (found[1].strip("\n"), found[2].lstrip("\n")) if found else ("", text)


class CallForm(NamedTuple):
    """The form of a turn that calls tools."""

    arguments_as_text: bool
    missing_content: Any
    """Content of a turn that has none; `...` leaves the key out."""


@dataclass
class TemplateForm:
    """The form of one chat template. Find it with `find_form`."""

    render: Render
    content_in_parts: bool = False
    reasoning_key: str | None = None
    """None if the template prints no reasoning."""
    _call_form: CallForm | None = None

    def shaped(self, turn: Message) -> Message:
        """Return a turn in this form.

        Reasoning that is part of the content, before `</think>`, is parted from it if the template prints reasoning.
        """
        shaped = dict(turn)
        if turn["role"] == "assistant" and self.reasoning_key:
            if not turn.get("reasoning_content") and turn["content"]:
                shaped["reasoning_content"], shaped["content"] = part_reasoning(turn["content"])
            if reasoning := shaped.pop("reasoning_content", None):
                shaped[self.reasoning_key] = reasoning
        if turn.get("tool_calls"):
            form = self.call_form
            shaped["tool_calls"] = [with_arguments(call, as_text=form.arguments_as_text) for call in turn["tool_calls"]]
            if not turn["content"]:
                shaped["content"] = form.missing_content
                if form.missing_content is ...:
                    del shaped["content"]
        if self.content_in_parts and isinstance(shaped.get("content"), str):
            shaped["content"] = [{"type": "text", "text": shaped["content"]}]
        return shaped

    def text(self, turn: Message) -> str:
        """Return the content of an assistant turn without reasoning that `shaped` parts from it."""
        content = turn["content"] or ""
        return part_reasoning(content)[1] if self.reasoning_key and not turn.get("reasoning_content") else content

    @property
    def call_form(self) -> CallForm:
        """The first form of a tool call that the template prints.

        Raises:
            RowError: if it prints none.
        """
        if self._call_form is None:
            forms = [CallForm(as_text, content) for as_text in (False, True) for content in (None, "", ...)]
            self._call_form = next((form for form in forms if self._prints_calls(form)), None)
        if self._call_form is None:
            raise RowError(
                "the chat template does not print tool calls; choose another `chat_template:`, or leave such rows out",
                "tool call that is not printed",
            )
        return self._call_form

    def _prints_calls(self, form: CallForm) -> bool:
        call = with_arguments(_CALL, as_text=form.arguments_as_text)
        turn: Message = {"role": "assistant", "content": form.missing_content, "tool_calls": [call]}
        if form.missing_content is ...:
            del turn["content"]
        printed = self._printed([{"role": "user", "content": self._in_parts(_QUESTION)}, turn])
        return "find_animal" in printed and "Okapi" in printed and not re.search("None|null|undefined", printed)

    def _in_parts(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.content_in_parts else text

    def _printed(self, turns: Sequence[Message]) -> str:
        try:
            return self.render(turns)
        except RowError:
            return ""


def find_form(render: Render) -> TemplateForm:
    """Find the form in which a template takes messages, by rendering short conversations."""
    form = TemplateForm(render)
    form.content_in_parts = _QUESTION not in form._printed([{"role": "user", "content": _QUESTION}]) and (
        _QUESTION in form._printed([{"role": "user", "content": [{"type": "text", "text": _QUESTION}]}])
    )
    form.reasoning_key = next((key for key in REASONING_KEYS if _prints_reasoning(form, key)), None)
    return form


def _prints_reasoning(form: TemplateForm, key: str) -> bool:
    answer = {"role": "assistant", "content": form._in_parts(_ANSWER), key: _REASONING}
    printed = form._printed([{"role": "user", "content": form._in_parts(_QUESTION)}, answer])
    return _REASONING in printed and _ANSWER in printed


def probes(turns: Sequence[Message]) -> Iterator[tuple[Message, list[str]]]:
    """Yield each turn with invented words in the place of its texts, and the words.

    A conversation of these shows which parts of a conversation of this shape a template prints.
    """
    for number, turn in enumerate(turns):
        probe, words = dict(turn), []
        if turn["content"]:
            words.append(f"{_QUESTION}{number}")
            probe["content"] = words[-1]
        if turn.get("reasoning_content"):
            probe["reasoning_content"] = f"{_REASONING}{number}"
            words.append(probe["reasoning_content"])
        if calls := turn.get("tool_calls"):
            names = [f"{_FUNCTION}_{number}_{index}" for index in range(len(calls))]
            probe["tool_calls"] = [renamed(call, name) for call, name in zip(calls, names, strict=True)]
            words += names
        yield probe, words


def renamed(definition: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a tool call, or the definition of a tool, with another name."""
    if isinstance(definition.get("function"), Mapping):
        return {**definition, "function": {**definition["function"], "name": name}}
    return {**definition, "name": name}

"""The form in which a chat template takes the parts of a message.

Templates agree on `role`, and differ in the rest: content as a text or as a list of parts, the name of the reasoning,
arguments of tool calls as a mapping or as JSON text. A template is tried with all of them, and messages are put into
the first form that it prints.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, meta

from axolotl_mopo.data.rows import Message
from axolotl_mopo.data.tool_calls import with_arguments
from axolotl_mopo.errors import RowError

Render = Callable[..., str]
"""Renders messages as they are, with `add_generation_prompt`; raises a RowError if the template refuses them."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Names of an assistant's reasoning, in data sets and in chat templates."""

_OPENING, _CLOSING = "<think>", "</think>"
_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
"""A tag of transformers, which marks what the assistant writes."""
QUESTION, ANSWER, REASONING = "Zyzzyva", "Quokka", "Wombat"
"""Invented words that no chat template writes by itself."""
_FUNCTION = "numbat"
_CALL = {
    "id": "call12345",  # some templates accept only nine letters and digits
    "type": "function",
    "function": {"name": "find_animal", "arguments": {"kind": "Okapi"}},
}


def part_reasoning(text: str, unopened: bool = False) -> tuple[str, str] | None:
    """Part a text that begins with reasoning between `<think>` and `</think>` into reasoning and answer.

    Args:
        text: the text of an assistant turn.
        unopened: whether the opening `<think>` may be missing, since the prompt ends with it.

    Returns:
        Reasoning and answer; None if the text does not begin with reasoning.
    """
    before, closing, answer = text.partition(_CLOSING)
    reasoning = before.lstrip()
    if not closing or not (reasoning.startswith(_OPENING) or (unopened and _OPENING not in reasoning)):
        return None
    return reasoning.removeprefix(_OPENING).strip("\n"), answer.lstrip("\n")


@cache
def variables(template: str) -> set[str]:
    """Return the names of the variables that a chat template reads."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 (it is only parsed)
    try:
        return meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template)))
    except TemplateError:
        return set(re.findall(r"\w+", template))


class CallForm(NamedTuple):
    """The form of a turn that calls tools."""

    arguments_as_text: bool
    missing_content: str | None
    """Content of a turn that has none: None, or an empty text for templates that print or refuse None."""


@dataclass
class TemplateForm:
    """The form of one chat template. Find it with `find_form`."""

    render: Render
    content_in_parts: bool = False
    reasoning_key: str | None = None
    """None if the template prints no reasoning."""
    parts_unopened: bool = False
    """Whether reasoning may end with `</think>` without having begun with `<think>`."""
    _call_form: CallForm | None = None

    def shaped(self, turn: Message) -> Message:
        """Return a turn in this form.

        Reasoning that is part of the content, before `</think>`, is parted from it if the template prints reasoning.
        """
        shaped = dict(turn)
        if turn["role"] == "assistant" and self.reasoning_key:
            if parts := self._parts(turn):
                shaped["reasoning_content"], shaped["content"] = parts
            if reasoning := shaped.pop("reasoning_content", None):
                shaped[self.reasoning_key] = reasoning
        if turn.get("tool_calls"):
            form = self.call_form
            shaped["tool_calls"] = [with_arguments(call, as_text=form.arguments_as_text) for call in turn["tool_calls"]]
            if not turn["content"]:
                shaped["content"] = form.missing_content
        if self.content_in_parts and isinstance(shaped.get("content"), str):
            shaped["content"] = [{"type": "text", "text": shaped["content"]}]
        return shaped

    def text(self, turn: Message) -> str:
        """Return the content of an assistant turn without reasoning that `shaped` parts from it."""
        parts = self._parts(turn)
        return parts[1] if parts else turn["content"] or ""

    def _parts(self, turn: Message) -> tuple[str, str] | None:
        if not self.reasoning_key or turn.get("reasoning_content") or not turn["content"]:
            return None
        return part_reasoning(turn["content"], self.parts_unopened)

    @property
    def call_form(self) -> CallForm:
        """The first form of a tool call that the template prints.

        Raises:
            RowError: if it prints none.
        """
        if self._call_form is None:
            forms = [CallForm(as_text, content) for as_text in (False, True) for content in (None, "")]
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
        printed = self._printed([{"role": "user", "content": self._in_parts(QUESTION)}, turn])
        return "find_animal" in printed and "Okapi" in printed and not re.search("None|null|undefined", printed)

    def _in_parts(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.content_in_parts else text

    def _printed(self, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self.render(turns, add_generation_prompt)
        except RowError:
            return ""


def find_form(render: Render) -> TemplateForm:
    """Find the form in which a template takes messages, by rendering short conversations."""
    form = TemplateForm(render)
    form.content_in_parts = QUESTION not in form._printed([{"role": "user", "content": QUESTION}]) and (
        QUESTION in form._printed([{"role": "user", "content": [{"type": "text", "text": QUESTION}]}])
    )
    form.reasoning_key = next((key for key in REASONING_KEYS if _prints_reasoning(form, key)), None)
    form.parts_unopened = form.reasoning_key is not None and _parts_unopened(form, form.reasoning_key)
    return form


def _parts_unopened(form: TemplateForm, key: str) -> bool:
    """Whether prompts end with an opened thought, or the template parts such a text itself."""
    question = {"role": "user", "content": form._in_parts(QUESTION)}
    if form._printed([question], add_generation_prompt=True).rstrip().endswith(_OPENING):
        return True
    text = {"role": "assistant", "content": form._in_parts(f"{REASONING}{_CLOSING}{ANSWER}")}
    parted = {"role": "assistant", "content": form._in_parts(ANSWER), key: REASONING}
    return form._printed([question, text]) == form._printed([question, parted])


def _prints_reasoning(form: TemplateForm, key: str) -> bool:
    answer = {"role": "assistant", "content": form._in_parts(ANSWER), key: REASONING}
    printed = form._printed([{"role": "user", "content": form._in_parts(QUESTION)}, answer])
    return REASONING in printed and ANSWER in printed


def probes(turns: Sequence[Message]) -> Iterator[tuple[Message, list[str]]]:
    """Yield each turn with invented words in the place of its texts, and the words.

    A conversation of these shows which parts of a conversation of this shape a template prints.
    """
    for number, turn in enumerate(turns):
        probe, words = dict(turn), []
        if turn["content"]:
            words.append(f"{QUESTION}{number}")
            probe["content"] = words[-1]
        if turn.get("reasoning_content"):
            probe["reasoning_content"] = f"{REASONING}{number}"
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

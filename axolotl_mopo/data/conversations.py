"""Conversations: messages in a column, turns marked within one string, and the directive in the last user turn."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_mopo.config.directives import Directive
from axolotl_mopo.data.rows import NO_INPUTS, Message, RatedResponse, Row, TemplateInputs, valid_text
from axolotl_mopo.data.template_form import REASONING_KEYS
from axolotl_mopo.data.tool_calls import structured, tool_calls
from axolotl_mopo.errors import RowError

_MARK = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"
)
_SHAREGPT_NAMES = ("human", "gpt", "chatgpt", "bing", "bard")
"""ShareGPT's role names that chat templates do not use."""
_OF_ASSISTANTS = (*REASONING_KEYS, "tool_calls")


def user(content: str) -> list[Message]:
    """Return a conversation of one user turn."""
    return [{"role": "user", "content": content}]


def messages(value: Any, name: str) -> list[Message]:
    """Return the turns in a column that holds a string, messages, or the JSON text of messages.

    A turn has `role` and `content`, or ShareGPT's `from` and `value`. The content is a string or a list of text parts;
    it may be null in a turn with `tool_calls`. Reasoning may be in `reasoning_content`, `reasoning` or `thinking`.

    Raises:
        RowError: if the column holds neither, or a text is not valid Unicode.
    """
    if isinstance(value, str):
        turns = _decoded_turns(value)
        if turns is None:
            return user(valid_text(value, name))
        value = turns
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(f"its `{name}` must be a string or messages, not {type(value).__name__}")
    return [_turn(turn, name) for turn in value]


def _decoded_turns(text: str) -> list[Any] | None:
    """Decode a string that is the JSON text of messages; None for any other string."""
    if not text.lstrip().startswith("["):
        return None
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_turns = isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in turns
    )
    return turns if turns and is_turns else None


def check_answered(turns: Sequence[Message], name: str) -> None:
    """Check that the turns in a column end with the assistant's.

    Raises:
        RowError: if they do not.
    """
    role = turns[-1]["role"] if turns else None
    if role != "assistant":
        raise RowError(f"its `{name}` must end with a turn of role 'assistant', not {role!r}")


def response(turns: Sequence[Message], name: str, scores: Mapping[str, float | None]) -> RatedResponse:
    """Return the response that some turns of a column are.

    Raises:
        RowError: if they do not end with an assistant turn.
    """
    check_answered(turns, name)
    last = turns[-1]
    is_text = len(turns) == 1 and not (last.keys() & {"reasoning_content", "tool_calls"})
    return RatedResponse(last["content"] or "", scores, () if is_text else turns)


def template_inputs(row: Row) -> TemplateInputs:
    """Return what the columns `tools` and `chat_template_kwargs` of a row hold, as lists and mappings or as JSON text.

    Raises:
        RowError: if they hold something else.
    """
    tools = structured(row.get("tools"), "tools") or []
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"its `tools` must be a list of function definitions or its JSON text, not {tools!r:.60}")
    kwargs = structured(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise RowError(f"its `chat_template_kwargs` must be a mapping or its JSON text, not {kwargs!r:.60}")
    return TemplateInputs([dict(tool) for tool in tools], dict(kwargs)) if tools or kwargs else NO_INPUTS


def _turn(raw: Mapping[str, Any], name: str) -> Message:
    # A table stores the keys of all rows' turns in every turn; a key that a turn does not have is None.
    turn = {key: value for key, value in raw.items() if value is not None}
    if "role" not in turn and "from" in turn:
        turn = _from_sharegpt(turn, name)
    elif turn.get("role") in _SHAREGPT_NAMES:
        turn["role"] = _SHAREGPT_ROLES[turn["role"]]
    if "function_call" in turn:
        raise RowError(
            f"a turn of its `{name}` has `function_call`, the old form of a tool call; write it as "
            "tool_calls: [{type: function, function: {name: ..., arguments: ...}}]",
            "old form of a tool call",
        )
    if isinstance(turn.get("content"), list):
        turn["content"] = _joined_parts(turn["content"], name)
    own = _of_assistants(turn, name)
    turn = {key: value for key, value in turn.items() if key not in _OF_ASSISTANTS} | own
    if own and turn.get("role") != "assistant":
        raise RowError(
            f"a turn of role {turn.get('role')!r} in its `{name}` has {' and '.join(own)}; only assistants do"
        )
    if "tool_calls" in own and not turn.get("content"):
        turn["content"] = None
    elif not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        raise RowError(f"a turn of its `{name}` has no `role` or no `content` that is a string: {dict(raw)!r:.99}")
    # `datasets` may have parsed a text in the file as a date.
    written = json.dumps(turn, default=str, ensure_ascii=False)
    return json.loads(valid_text(written, name))


def _of_assistants(turn: Message, name: str) -> Message:
    """Return the reasoning and the tool calls of a turn, if any, each under the one key that this package uses."""
    own: Message = {}
    reasoning = [turn[key] for key in REASONING_KEYS if turn.get(key)]
    if reasoning:
        if any(text != reasoning[0] or not isinstance(text, str) for text in reasoning):
            raise RowError(f"the reasoning in a turn of its `{name}` must be one text, not {reasoning!r:.99}")
        own["reasoning_content"] = reasoning[0]
    if calls := tool_calls(turn.get("tool_calls"), name):
        own["tool_calls"] = calls
    return own


def _from_sharegpt(turn: Message, name: str) -> Message:
    role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise RowError(
            f"a turn of its `{name}` is from {turn['from']!r:.40}; known roles are {', '.join(_SHAREGPT_ROLES)}",
            "unknown role",
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return rest | {"role": role} | ({"content": turn["value"]} if "value" in turn else {})


def _joined_parts(parts: Sequence[Any], name: str) -> str:
    """Return the text of a content that is a list of parts."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f"a turn of its `{name}` has a part of type {kind!r:.40} that is not a text; only texts are trained "
                "on, not images, audio or video",
                "content that is not text",
            )
        texts.append(part["text"])
    return "".join(texts)


def marked_turns(prompt: str) -> list[Message]:
    """Split a HelpSteer2 prompt into turns.

    It begins with a user turn; `<extra_id_1>User` or `<extra_id_1>Assistant` precedes every later turn.

    Raises:
        RowError: if it ends with an assistant turn that is not empty.
    """
    first, *parts = _MARK.split(prompt)
    turns = [{"role": "user", "content": first}]
    turns += [{"role": role.lower(), "content": content} for role, content in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        del turns[-1]
    if turns[-1]["role"] != "user":
        raise RowError("its prompt ends with an assistant turn; it must end with a user turn")
    return turns


def with_directive(messages: Sequence[Message], directive: Directive) -> list[Message]:
    """Return the conversation with the directive added to its last user turn, or to its system turn.

    The results of tools after the last user turn stay as they are.
    """
    if directive.in_system:
        has_system = bool(messages) and messages[0]["role"] == "system"
        content = messages[0]["content"] if has_system else ""
        return [{"role": "system", "content": directive.around(content)}, *messages[has_system:]]
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    turn = {**messages[last], "content": directive.around(messages[last]["content"])}
    return [*messages[:last], turn, *messages[last + 1 :]]

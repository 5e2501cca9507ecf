"""Conversations: messages in a column, turns marked within one string, and the directive in the last user turn."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from axolotl_mopo.config.directives import Directive
from axolotl_mopo.data.rows import Message, valid_text
from axolotl_mopo.errors import RowError

_MARK = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"
)
_SHAREGPT_NAMES = ("human", "gpt", "chatgpt", "bing", "bard")
"""ShareGPT's role names that chat templates do not use."""
_UNTRAINED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a turn that are not trained on."""


def user(content: str) -> list[Message]:
    """Return a conversation of one user turn."""
    return [{"role": "user", "content": content}]


def messages(value: Any, name: str) -> list[Message]:
    """Return the turns in a column that holds a string or messages.

    A turn has `role` and `content`, or ShareGPT's `from` and `value`. The content is a string or a list of text parts.

    Raises:
        RowError: if the column holds neither, or a text is not valid Unicode.
    """
    if isinstance(value, str):
        return user(valid_text(value, name))
    if not isinstance(value, Sequence) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError(f"its `{name}` must be a string or messages, not {type(value).__name__}")
    return [_turn(turn, name) for turn in value]


def answer(turn: Message, name: str) -> str:
    """Return the content of the last turn in a column.

    Raises:
        RowError: if the turn holds something else, such as tool calls, which would not be trained on.
    """
    if kept := [key for key in _UNTRAINED if turn.get(key)]:
        raise RowError(
            f"the response in its `{name}` has `{kept[0]}`, which would be left out because only `content` is trained "
            "on; move what matters into `content`, or leave such rows out",
            "response that is more than a text",
        )
    content: str = turn["content"]
    return content


def _turn(raw: Mapping[str, Any], name: str) -> Message:
    # A table stores the keys of all rows' turns in every turn; a key that a turn does not have is None.
    turn = {key: value for key, value in raw.items() if value is not None}
    if "role" not in turn and "from" in turn:
        turn = _from_sharegpt(turn, name)
    elif turn.get("role") in _SHAREGPT_NAMES:
        turn["role"] = _SHAREGPT_ROLES[turn["role"]]
    if isinstance(turn.get("content"), list):
        turn["content"] = _joined_parts(turn["content"], name)
    if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        raise RowError(f"a turn of its `{name}` has no `role` or no `content` that is a string: {dict(raw)!r:.99}")
    # `datasets` may have parsed a text in the file as a date.
    written = json.dumps(turn, default=str, ensure_ascii=False)
    return json.loads(valid_text(written, name))


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
    """Return the conversation with the directive added to its last user turn."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    turn = {**messages[last], "content": directive.around(messages[last]["content"])}
    return [*messages[:last], turn, *messages[last + 1 :]]

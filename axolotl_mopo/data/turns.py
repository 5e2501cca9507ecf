"""Conversations that a data set keeps in one string."""

import re

from axolotl_mopo.data.rows import Message, RowError

_MARK = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


def marked_turns(prompt: str) -> list[Message]:
    """HelpSteer2's prompts: the user's first turn, and every later one behind `<extra_id_1>User` or `...Assistant`.

    Raises:
        RowError: where the last turn is the assistant's and says something.
    """
    first, *parts = _MARK.split(prompt)
    turns = [{"role": "user", "content": first}]
    turns += [{"role": role.lower(), "content": content} for role, content in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        del turns[-1]
    if turns[-1]["role"] != "user":
        raise RowError("its prompt ends with a turn of the assistant; it must end with the user's")
    return turns

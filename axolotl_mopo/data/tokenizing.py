"""Render conversations with the tokenizer's chat template and turn them into token ids."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from axolotl_mopo.data.chat_templates import check_chat_template
from axolotl_mopo.data.rows import Message, PreferencePair
from axolotl_mopo.errors import DataError, RowError


class ChatRenderer:
    """Renders prompts and completions, which are tokenised separately and concatenated.

    Args:
        tokenizer: a tokenizer with a chat template.

    Raises:
        DataError: if the tokenizer has no usable chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; set `chat_template:` in the YAML, for example to chatml"
            )
        self._tokenizer = tokenizer
        self._refusals: dict[tuple[str, ...], str | None] = {}
        probe = "Zyzzyva"
        try:
            ending = self._render([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": probe}])
        except RowError as error:
            raise DataError(str(error)) from None
        if probe not in ending:
            raise DataError("the chat template leaves out the assistant's response; choose another `chat_template:`")
        ending = ending[ending.rindex(probe) + len(probe) :]
        self._after_turn = ending[len(ending.rstrip()) :]
        """Whitespace after the end-of-turn token, which is not part of the completion."""
        self._missing_end = "" if ending.strip() else tokenizer.eos_token or ""

    def prompt(self, messages: Sequence[Message]) -> str:
        """Render the conversation including the header of the assistant turn that follows."""
        return self._render(messages, add_generation_prompt=True)

    def completion(self, messages: Sequence[Message], response: str) -> str:
        """Render the text after the prompt if the assistant answers `response`, including the end-of-turn token.

        Raises:
            RowError: if the template renders the prompt differently when a response follows.
        """
        prompt = self.prompt(messages)
        answered = self._render([*messages, {"role": "assistant", "content": response}])
        if not answered.startswith(prompt):
            raise RowError(
                "the chat template renders the prompt differently if a response follows, so the tokens of the response "
                "cannot be separated; choose another `chat_template:`"
            )
        return answered[len(prompt) :].removesuffix(self._after_turn) + self._missing_end

    def check_roles(self, messages: Sequence[Message]) -> None:
        """Render a conversation of these roles, once for each sequence of roles.

        Raises:
            RowError: if the template refuses the roles or leaves out a turn.
        """
        roles = tuple(message["role"] for message in messages)
        if roles not in self._refusals:
            self._refusals[roles] = None
            try:
                self._check_turns(roles)
            except RowError as error:
                self._refusals[roles] = str(error)
        if refusal := self._refusals[roles]:
            raise RowError(refusal, "refused by the chat template")

    def _check_turns(self, roles: Sequence[str]) -> None:
        turns = [{"role": role, "content": f"Zyzzyva{number}"} for number, role in enumerate(roles)]
        self.completion(turns, "Zyzzyva")
        prompt = self.prompt(turns)
        if left_out := [turn["role"] for turn in turns if turn["content"] not in prompt]:
            raise RowError(
                f"the chat template leaves out the content of a turn of role {left_out[0]} in a conversation of the "
                f"roles {', '.join(roles)}; choose another `chat_template:`"
            )

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return render_chat(self._tokenizer, messages, add_generation_prompt)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    """Render a conversation with the tokenizer's chat template.

    Raises:
        RowError: if the template refuses the conversation, cannot be rendered, or takes too much time or memory.
    """
    conversation = list(messages)

    def render() -> str:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert isinstance(text, str)  # noqa: S101 (tokenize=False)
        return text

    try:
        check_chat_template(f"{add_generation_prompt} {tokenizer.chat_template!r}", render)
        return render()
    except Exception as error:  # untrusted templates may raise anything
        roles = ", ".join(str(message.get("role")) for message in conversation)
        raise RowError(
            f"the chat template refuses a conversation of the roles {roles}: {str(error) or repr(error)}"
        ) from None


class ControlTokenCount:
    """Counts the pairs whose texts contain a control token of the tokenizer, such as its end-of-turn token.

    The tokenizer cannot distinguish such a text from the token that the chat template writes.

    Args:
        tokenizer: the tokenizer of the run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._pattern = _any_of({*added, *tokenizer.all_special_tokens} - {""})
        self.pairs = 0
        self.first_row: int | None = None
        self.found: Counter[str] = Counter()
        """Number of pairs that contain each token."""

    def watch(self, pairs: Iterable[tuple[int, PreferencePair]]) -> Iterator[tuple[int, PreferencePair]]:
        """Yield the pairs unchanged and count those with control tokens."""
        for number, pair in pairs:
            texts = (*(turn["content"] for turn in pair.prompt), pair.chosen.text, pair.rejected.text)
            if found := {token for text in texts for token in self._pattern.findall(text)}:
                self.pairs += 1
                self.found.update(found)
                self.first_row = number if self.first_row is None else self.first_row
            yield number, pair


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the longest of these texts.

    There may be hundreds, so texts with the same first two characters share a branch.
    """
    branches: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        branches.setdefault(token[:2], []).append(re.escape(token[2:]))
    return re.compile("|".join(f"{re.escape(head)}(?:{'|'.join(rest)})" for head, rest in branches.items()) or "(?!)")


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Tokenise texts that contain their special tokens already."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def shorten(tokenizer: PreTrainedTokenizerBase, ids: list[int], limit: int) -> tuple[list[int], str]:
    """Return the first tokens, at most `limit`, and a text that has no more tokens than `limit`."""
    ids = ids[:limit]
    while len(tokenize(tokenizer, [text := str(tokenizer.decode(ids))])[0]) > limit:
        ids = ids[:-1]
    return ids, text

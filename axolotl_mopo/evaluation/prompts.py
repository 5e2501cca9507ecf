"""The prompts that policies are compared on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_mopo.data.conversations import marked_turns, messages
from axolotl_mopo.data.rows import Message, check_prompt, column, valid_text
from axolotl_mopo.data.tables import load_table
from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import DataError, RowError

_FIELDS = ("prompt", "messages", "question", "instruction")


@dataclass(frozen=True)
class Prompts:
    """Conversations that end with the user's turn, each once."""

    source: str
    conversations: list[list[Message]]
    repeated: int
    """Rows that were left out because their prompt was there before."""

    @property
    def digest(self) -> int:
        """A number made of the content."""
        return fingerprint(self.conversations)


def read_prompts(
    source: str,
    *,
    field: str | None = None,
    limit: int | None = None,
    split: str = "train",
    name: str | None = None,
    data_files: Sequence[str] = (),
    revision: str | None = None,
) -> Prompts:
    """Read the prompts of a file, a folder or a data set of the hub.

    Args:
        source: as `axolotl mopo pairs` takes it.
        field: the prompts' column; by default the first there is of `prompt`, `messages`, `question`, `instruction`.
        limit: read no more distinct prompts than this.
        split, name, data_files, revision: of the data set.

    Raises:
        DataError: naming the row that has no prompt.
    """
    table = load_table(source, split=split, name=name, data_files=data_files, revision=revision)
    chosen = field or next((known for known in _FIELDS if known in table.column_names), None)
    if chosen is None or chosen not in table.column_names:
        raise DataError(
            f"{source} has no column {chosen or ' or '.join(_FIELDS)}; its columns are "
            f"{', '.join(table.column_names)}; name the prompts' one with --field"
        )
    seen, conversations, repeated = set(), [], 0
    for number, value in enumerate(table[chosen]):
        try:
            conversation = _conversation(column({chosen: value}, chosen), chosen)
            check_prompt(conversation)
        except RowError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
        key = fingerprint(conversation)
        if key in seen:
            repeated += 1
            continue
        seen.add(key)
        conversations.append(conversation)
        if len(conversations) == limit:
            break
    if not conversations:
        raise DataError(f"{source} has no prompts")
    return Prompts(source, conversations, repeated)


def _conversation(value: Any, name: str) -> list[Message]:
    """The turns of a prompt; HelpSteer's are marked inside a string."""
    return marked_turns(valid_text(value, name)) if isinstance(value, str) else messages(value, name)

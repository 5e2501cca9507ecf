"""Read the prompts that policies are compared on."""

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
    """Distinct conversations that end with a user turn."""

    source: str
    conversations: list[list[Message]]
    repeated: int
    """Number of rows left out because an earlier row has the same prompt."""

    @property
    def digest(self) -> int:
        """A digest of the conversations."""
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
        field: column of the prompts; by default the first of `prompt`, `messages`, `question`, `instruction`.
        limit: maximum number of distinct prompts.
        split, name, data_files, revision: as `datasets.load_dataset` takes them.

    Raises:
        DataError: if the column is missing, or a row has no valid prompt; names the row.
    """
    table = load_table(source, split=split, name=name, data_files=data_files, revision=revision)
    chosen = field or next((known for known in _FIELDS if known in table.column_names), None)
    if chosen is None or chosen not in table.column_names:
        raise DataError(
            f"{source} has no column {chosen or ' or '.join(_FIELDS)}; its columns are "
            f"{', '.join(table.column_names)}; name the column of the prompts with --field"
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
        raise DataError(f"{source} has no prompts; use a file or a split with at least one row")
    return Prompts(source, conversations, repeated)


def _conversation(value: Any, name: str) -> list[Message]:
    """The turns of a prompt. HelpSteer marks turns inside a string."""
    return marked_turns(valid_text(value, name)) if isinstance(value, str) else messages(value, name)

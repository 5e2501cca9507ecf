"""Read the prompts that policies are compared on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from axolotl_mopo.data.conversations import marked_turns, messages, template_inputs, user
from axolotl_mopo.data.media import check_texts_only, media_columns, stored_batches
from axolotl_mopo.data.rows import NO_INPUTS, Message, TemplateInputs, check_prompt, column, prompt_content
from axolotl_mopo.data.tables import load_table
from axolotl_mopo.digests import fingerprint
from axolotl_mopo.errors import DataError, RowError

_FIELDS = ("prompt", "messages", "question", "instruction")
_BATCH = 1000
_INPUTS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Prompts:
    """Distinct conversations that end with a user's or a tool's turn."""

    source: str
    conversations: list[list[Message]]
    repeated: int
    """Number of rows left out because an earlier row has the same prompt."""
    inputs: Sequence[TemplateInputs] = ()
    """What else the chat template reads of each prompt; empty if it reads nothing of any."""

    def inputs_of(self, number: int) -> TemplateInputs:
        """What else the chat template reads of a prompt."""
        return self.inputs[number] if self.inputs else NO_INPUTS

    def content(self, number: int) -> Any:
        """The content of a prompt, to compare prompts by."""
        return prompt_content(self.conversations[number], self.inputs_of(number))

    @property
    def digest(self) -> int:
        """A digest of the prompts."""
        return fingerprint([self.content(number) for number in range(len(self.conversations))])


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

    The columns `tools` and `chat_template_kwargs` may hold what else the chat template reads of a prompt.

    Args:
        source: as `axolotl mopo pairs` takes it.
        field: column of the prompts; by default the first of `prompt`, `messages`, `question`, `instruction`.
        limit: maximum number of distinct prompts.
        split, name, data_files, revision: as `datasets.load_dataset` takes them.

    Raises:
        DataError: if the column is missing, or a row has no valid prompt or has images; names the row.
    """
    table = load_table(source, split=split, name=name, data_files=data_files, revision=revision)
    chosen = field or next((known for known in _FIELDS if known in table.column_names), None)
    if chosen is None or chosen not in table.column_names:
        raise DataError(
            f"{source} has no column {chosen or ' or '.join(_FIELDS)}; its columns are "
            f"{', '.join(table.column_names)}; name the column of the prompts with --field"
        )
    media = [name for name in media_columns(table.features) if name != chosen]
    read = [name for name in (chosen, *_INPUTS, *media) if name in table.column_names]
    seen, conversations, inputs, repeated = set(), [], [], 0
    for number, row in enumerate(_rows(table.select_columns(read))):
        try:
            check_texts_only(row, media)
            conversation, own = _conversation(column(row, chosen), chosen), template_inputs(row)
            check_prompt(conversation)
        except RowError as error:
            raise DataError(f"{source}, row {number}: {error}") from None
        key = fingerprint(prompt_content(conversation, own))
        if key in seen:
            repeated += 1
            continue
        seen.add(key)
        conversations.append(conversation)
        inputs.append(own)
        if len(conversations) == limit:
            break
    if not conversations:
        raise DataError(f"{source} has no prompts; use a file or a split with at least one row")
    return Prompts(source, conversations, repeated, inputs if any(each != NO_INPUTS for each in inputs) else ())


def _rows(table: Dataset) -> Iterator[dict[str, Any]]:
    """The rows, with images, audio and video as they are stored."""
    for batch in stored_batches(table, _BATCH):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _conversation(value: Any, name: str) -> list[Message]:
    """The turns of a prompt. HelpSteer marks turns inside a string."""
    turns = messages(value, name)
    return marked_turns(value) if isinstance(value, str) and turns == user(value) else turns

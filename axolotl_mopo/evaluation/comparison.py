"""Read and write the folder of a comparison: its settings, and a JSONL file of responses for every policy.

    comparison.json          prompts, sampling, policies, objectives
    responses/NAME.jsonl     one line per response: `prompt_id`, `sample`, `prompt`, `response`, `token_ids`,
                             `finished`, `logp`, `ref_logp`, and a column for every objective; `tools` and
                             `chat_template_kwargs` of a prompt that has them; `reasoning` and `reasoning_tokens` of
                             a response that has reasoning before its answer

Every write is atomic. Unfinished columns are kept in `responses/.partial` until they are complete. The folder may come
from anybody, so everything in it is checked when it is read, and symbolic links in it are refused.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from accelerate.utils import tqdm
from pydantic import TypeAdapter

from axolotl_mopo.digests import fingerprint, token_ids_digest
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.policies import Policy
from axolotl_mopo.evaluation.schema import (
    Objective,
    Partial,
    Response,
    Settings,
    check_number,
    prompt_of,
    response_key,
)
from axolotl_mopo.files import Folder
from axolotl_mopo.records import parse_record

_SETTINGS = "comparison.json"
_SETTINGS_LIMIT = 1 << 26
_LINE_LIMIT = 1 << 26
_LOCK = ".lock"

_settings = TypeAdapter(Settings)
_response = TypeAdapter(Response)
_partial = TypeAdapter(Partial)


class Comparison:
    """Reads and writes the folder of a comparison. Only one process may write to it at a time; see `opened`.

    Args:
        folder: written by `axolotl mopo generate`.

    Raises:
        ConfigError: if `comparison.json` is invalid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = Folder(folder)
        content = self._files.read(_SETTINGS, _SETTINGS_LIMIT) if folder.exists() else None
        where = str(folder / _SETTINGS)
        self.settings = Settings() if content is None else parse_record(_settings, content, where)

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Self]:
        """Context manager that locks a folder and opens the comparison in it. Creates a missing folder.

        Raises:
            ConfigError: if another command has locked the folder.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(Folder(folder).locked(_LOCK))
            except BlockingIOError:
                raise ConfigError(f"another axolotl mopo command works in {folder}; wait until it has ended") from None
            yield cls(folder)  # read after locking, so that no change of another command is lost

    @classmethod
    @contextmanager
    def existing(cls, folder: Path) -> Iterator[Self]:
        """Like `opened`, but only for a folder that has responses.

        Raises:
            ConfigError: if the folder has no responses.
        """
        if not (folder / _SETTINGS).exists():
            raise _no_responses(folder)
        with cls.opened(folder) as comparison:
            if not comparison.has_responses:
                raise _no_responses(folder)
            yield comparison

    @property
    def policies(self) -> list[Policy]:
        """The policies, in the order in which they were added."""
        return [Policy(name, **dict(record)) for name, record in self.settings.policies.items()]

    @property
    def objectives(self) -> dict[str, Objective]:
        """The scored objectives."""
        return self.settings.objectives

    @property
    def has_responses(self) -> bool:
        """Whether there is at least one response."""
        return any(self._files.size(_file(policy)) for policy in self.settings.policies)

    def agree(self, **settings: Any) -> None:
        """Set what all responses have in common.

        These are `prompts`, `sampling`, `asking`, `reference`, `chat_template_kwargs`.

        If the folder has no responses, its old settings are discarded.

        Raises:
            ConfigError: if existing responses were generated with other settings.
        """
        agreed = _checked({**(self._content() if self.has_responses else {}), **settings}, self.folder)
        if self.has_responses:
            for name in settings:
                known, wanted = getattr(self.settings, name), getattr(agreed, name)
                if known != wanted:
                    raise ConfigError(
                        f"{self.folder} has responses made with {name} {known!r}, not {wanted!r}; choose another --out"
                    )
        self.settings = agreed

    def name_source(self, source: str) -> None:
        """Record the source of the prompts, unless one is recorded already."""
        if self.settings.source is None:
            self.settings = _checked({**self._content(), "source": source}, self.folder)

    def add_policy(self, policy: Policy) -> None:
        """Add a policy.

        Raises:
            ConfigError: if another policy has its name.
        """
        content = self._content()
        added = _checked({**content, "policies": {**content["policies"], policy.name: policy.to_json()}}, self.folder)
        known = self.settings.policies.get(policy.name)
        if known not in (None, added.policies[policy.name]):
            assert known  # noqa: S101
            raise ConfigError(
                f"{self.folder} has responses of {known.path} under the name {policy.name}, and {policy.path} is "
                "another run or was trained again; give it another name, as NAME=PATH, or choose another --out"
            )
        if known is None and self._files.size(_file(policy.name)):
            raise ConfigError(
                f"{self.folder / _file(policy.name)} exists, but {_SETTINGS} does not list {policy.name}; remove the "
                "file, or choose another --out"
            )
        self.settings = added

    def drop_objective(self, name: str) -> None:
        """Remove an objective from the settings, if it is there; its columns stay."""
        content = self._content()
        content["objectives"].pop(name, None)
        self.settings = _checked(content, self.folder)

    def add_objective(self, name: str, objective: Objective) -> None:
        """Add an objective, or replace one.

        Raises:
            ConfigError: if its name cannot be a column name.
        """
        content = self._content()
        objectives = {**content["objectives"], name: objective.model_dump()}
        self.settings = _checked({**content, "objectives": objectives}, self.folder)

    def save_settings(self) -> None:
        """Write the settings."""
        text = json.dumps(self._content(), indent=2, ensure_ascii=False) + "\n"
        self._files.write(_SETTINGS, text.encode())

    def write_outputs(self, contents: Mapping[str, bytes]) -> None:
        """Write files derived from the comparison.

        Raises:
            OSError: if something other than a file has one of the names. Nothing is written in this case.
        """
        for name in contents:
            self._files.size(name)
        for name, content in contents.items():
            self._files.write(name, content)

    def responses(self, policy: str) -> list[Response]:
        """Read the responses of a policy, sorted by prompt and sample. Skips the incomplete last line of a killed run.

        Raises:
            ConfigError: if a line is invalid or a response is there twice; names the file and the line.
        """
        where = self.folder / _file(policy)
        lines = self._files.lines(_file(policy), _LINE_LIMIT)
        rows = [_read_response(line, f"{where}, line {number}") for number, line in enumerate(lines, 1)]
        seen: set[tuple[int, int]] = set()
        for number, row in enumerate(rows, 1):
            if response_key(row) in seen:
                raise ConfigError(
                    f"{where}, line {number}: sample {row['sample']} of prompt {row['prompt_id']} is there twice; "
                    "remove one of the lines"
                )
            seen.add(response_key(row))
        return sorted(rows, key=response_key)

    def complete(self, policy: str) -> list[Response]:
        """Read the responses of a policy and check that they are complete: every sample for every prompt.

        Raises:
            ConfigError: if a response is missing or does not belong to the comparison.
        """
        prompts, sampling = self.settings.prompts, self.settings.sampling
        if prompts is None or sampling is None:
            raise _no_responses(self.folder)
        rows = self.responses(policy)
        expected = prompts.count * sampling.samples
        if len(rows) < expected:
            raise ConfigError(
                f"{policy} has {len(rows):,} of {expected:,} responses; run axolotl mopo generate again to generate "
                "the others"
            )
        wanted = [(prompt, sample) for prompt in range(prompts.count) for sample in range(sampling.samples)]
        if [response_key(row) for row in rows] != wanted:
            raise ConfigError(
                f"{self.folder / _file(policy)} has other responses than {sampling.samples} to each of {prompts.count} "
                "prompts, counted from 0; copy the folder again, or generate the responses again"
            )
        if fingerprint([prompt_of(row) for row in rows if row["sample"] == 0]) != prompts.digest:
            raise ConfigError(
                f"{self.folder / _file(policy)} has other prompts than {_SETTINGS} says; copy the folder again, or "
                "generate the responses again"
            )
        return rows

    def append(self, policy: str, rows: Sequence[Response]) -> None:
        """Append responses of a policy."""
        self._files.append(_file(policy), _text(rows))

    def replace(self, policy: str, rows: Iterable[Response]) -> None:
        """Replace all responses of a policy."""
        self._files.write(_file(policy), _text(rows))

    def compute(
        self,
        policy: str,
        column: str,
        source: str,
        batch: int,
        function: Callable[[list[Response]], list[float]],
        title: str,
    ) -> list[float]:
        """Compute one number for every response of a policy. A killed run continues where it stopped.

        Args:
            policy: name of the policy.
            column: column that the numbers are for.
            source: digest of everything that the numbers depend on besides the responses.
            batch: number of responses per call of `function`; the longest come first.
            function: computes the numbers of some responses.
            title: title of the progress bar.

        Returns:
            The numbers, in the order of `responses`.

        Raises:
            ConfigError: if a number is not finite or too large; names the response.
        """
        rows = self.responses(policy)
        partial = _partial_file(policy, column, source, rows)
        values = {(entry["prompt_id"], entry["sample"]): entry["value"] for entry in self._partial_lines(partial)}
        missing = [row for row in rows if response_key(row) not in values]
        missing.sort(key=lambda row: -len(row["token_ids"]))
        for start in tqdm(range(0, len(missing), batch), desc=title):
            part = missing[start : start + batch]
            computed = {response_key(row): value for row, value in zip(part, function(part), strict=True)}
            _check_values(computed, title)
            self._files.append(
                partial,
                _text({"prompt_id": key[0], "sample": key[1], "value": value} for key, value in computed.items()),
            )
            values |= computed
        return [values[response_key(row)] for row in rows]

    def add_column(self, policy: str, column: str, values: Sequence[float], sources: Iterable[str] = ()) -> None:
        """Add a column to the responses of a policy.

        Args:
            policy: name of the policy.
            column: name of the column.
            values: one number per response, in the order of `responses`.
            sources: the `source` of each `compute` that contributed; its partial results are removed.

        Raises:
            ConfigError: if a number is not finite or too large; names the response.
        """
        rows = self.responses(policy)
        _check_values(dict(zip(map(response_key, rows), values, strict=True)), f"{policy}, {column}")
        added: list[Any] = [{**row, column: value} for row, value in zip(rows, values, strict=True)]
        self.replace(policy, added)
        for source in sources:
            self._files.remove(_partial_file(policy, column, source, rows))

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = self.settings.model_dump(mode="json")
        return content

    def _partial_lines(self, name: str) -> Iterator[Partial]:
        for number, line in enumerate(self._files.lines(name, _LINE_LIMIT), 1):
            yield parse_record(_partial, line, f"{self.folder / name}, line {number}")


def _checked(content: dict[str, Any], folder: Path) -> Settings:
    """Validate settings of any origin.

    Raises:
        ConfigError: if a key is wrong; names it.
    """
    return parse_record(_settings, json.dumps(content).encode(), str(folder / _SETTINGS))


def _no_responses(folder: Path) -> ConfigError:
    return ConfigError(f"{folder} holds no responses; generate them with axolotl mopo generate")


def _check_values(values: dict[tuple[int, int], float], title: str) -> None:
    for (prompt, sample), value in values.items():
        try:
            check_number(value)
        except ValueError as error:
            raise ConfigError(f"{title}: the number of prompt {prompt}, sample {sample}: {error}") from None


def _read_response(line: bytes, where: str) -> Response:
    row = parse_record(_response, line, where)
    if ("reasoning" in row) != ("reasoning_tokens" in row) or row.get("reasoning_tokens", 0) > len(row["token_ids"]):
        raise ConfigError(
            f"{where}, `reasoning_tokens`: it must be there if and only if `reasoning` is, and at most the number of "
            "`token_ids`; generate the response again"
        )
    for name in row.keys() - Response.__annotations__:
        value: Any = row[name]  # type: ignore[literal-required]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}, {name!a}: a score must be a number, not {value!a:.60}")
        try:
            check_number(value)
        except (OverflowError, ValueError) as error:
            raise ConfigError(f"{where}, {name!a}: {error}") from None
    return row


def _file(policy: str) -> str:
    return f"responses/{policy}.jsonl"


def _partial_file(policy: str, column: str, source: str, rows: Iterable[Response]) -> str:
    """File that keeps the numbers of a source for some responses until all are computed."""
    numbers = (
        [row["prompt_id"], row["sample"], len(row["token_ids"]), *row["token_ids"]]
        for row in sorted(rows, key=response_key)
    )
    return f"responses/.partial/{policy}/{column}/{source}-{token_ids_digest(numbers)}.jsonl"


def _text(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()

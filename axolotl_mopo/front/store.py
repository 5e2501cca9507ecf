"""The folder of a comparison: its settings, and a JSONL file of responses for every policy.

    comparison.json          prompts, sampling, policies, objectives
    responses/NAME.jsonl     a line for every response: `prompt_id`, `sample`, `prompt`, `response`, `token_ids`,
                             `finished`, `logp`, `ref_logp`, and a column for every objective

Every write appears whole or not at all, and what is half done is kept in `responses/.partial` until it is whole.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import tqdm
from filelock import FileLock

from axolotl_mopo.config import ConfigError
from axolotl_mopo.front.policies import Policy

Response = dict[str, Any]
"""A line of a policy's file."""

_SETTINGS = "comparison.json"


class Comparison:
    """Reads and writes the folder of a comparison.

    Args:
        folder: made by `axolotl mopo generate`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = {"policies": {}, "objectives": {}}
        if (folder / _SETTINGS).is_file():
            self.settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))

    @classmethod
    def existing(cls, folder: Path) -> "Comparison":
        """The comparison in a folder.

        Raises:
            ConfigError: where there is none.
        """
        comparison = cls(folder)
        if not comparison.policies:
            raise ConfigError(f"{folder} holds no responses; make them with axolotl mopo generate")
        return comparison

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        with lock.acquire(timeout=0.1):
            yield

    @property
    def policies(self) -> list[Policy]:
        """The policies, in the order in which they were given."""
        return [Policy.from_json(name, content) for name, content in self.settings["policies"].items()]

    @property
    def objectives(self) -> dict[str, dict[str, Any]]:
        """What was scored: `scorer`, `digest` and `lower_is_better` of every objective."""
        return self.settings["objectives"]

    def agree(self, **settings: Any) -> None:
        """Set what all responses have in common.

        Raises:
            ConfigError: where responses were made with another setting.
        """
        settings = json.loads(json.dumps(settings))
        for name, value in settings.items():
            known = self.settings.get(name, value)
            if known != value:
                raise ConfigError(
                    f"{self.folder} has responses made with {name} {known}, not {value}; choose another --out"
                )
        self.settings = {**settings, **self.settings}

    def add_policy(self, policy: Policy) -> None:
        """Add a policy.

        Raises:
            ConfigError: where another one has its name.
        """
        known = self.settings["policies"].get(policy.name)
        content = json.loads(json.dumps(policy.to_json()))
        if known not in (None, content):
            raise ConfigError(
                f"{self.folder} has responses of {known['path']} under the name {policy.name}, and {policy.path} is "
                "another run or was trained anew; give it another name, as NAME=PATH, or choose another --out"
            )
        self.settings["policies"][policy.name] = content

    def save_settings(self) -> None:
        """Write the settings."""
        _write(self.folder / _SETTINGS, json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n")

    def responses(self, policy: str) -> list[Response]:
        """The responses of a policy, by prompt and sample; what a killed process wrote of a line is left out."""
        rows = _read_lines(self._file(policy))
        return sorted(rows, key=_key)

    def append(self, policy: str, rows: Sequence[Response]) -> None:
        """Add responses of a policy."""
        _append(self._file(policy), rows)

    def replace(self, policy: str, rows: Iterable[Response]) -> None:
        """Write all responses of a policy anew."""
        _write(self._file(policy), "".join(map(_line, rows)))

    def compute(
        self,
        policy: str,
        column: str,
        source: str,
        batch: int,
        function: Callable[[list[Response]], list[float]],
        title: str,
    ) -> list[float]:
        """A number for every response of a policy, in their order; a killed run goes on where it was.

        Args:
            policy: its name.
            column: that the numbers are for.
            source: a name made of what they are computed with.
            batch: how many responses to compute at a time, the longest first.
            function: their numbers.
            title: of the progress bar.
        """
        rows = self.responses(policy)
        partial = self._partial(policy, column) / f"{source}.jsonl"
        values = {(entry["prompt_id"], entry["sample"]): entry["value"] for entry in _read_lines(partial)}
        missing = [row for row in rows if _key(row) not in values]
        missing.sort(key=lambda row: -len(row["token_ids"]))
        for start in tqdm(range(0, len(missing), batch), desc=title):
            part = missing[start : start + batch]
            computed = dict(zip(map(_key, part), function(part), strict=True))
            _append(
                partial,
                [{"prompt_id": key[0], "sample": key[1], "value": value} for key, value in computed.items()],
            )
            values |= computed
        return [values[_key(row)] for row in rows]

    def add_column(self, policy: str, column: str, values: Sequence[float]) -> None:
        """Give every response of a policy its number, in their order."""
        rows = self.responses(policy)
        self.replace(policy, [{**row, column: value} for row, value in zip(rows, values, strict=True)])
        shutil.rmtree(self._partial(policy, column), ignore_errors=True)

    def _partial(self, policy: str, column: str) -> Path:
        return self._file(policy).parent / ".partial" / policy / column

    def _file(self, policy: str) -> Path:
        return self.folder / "responses" / f"{policy}.jsonl"


def _key(row: Response) -> tuple[int, int]:
    return row["prompt_id"], row["sample"]


def _line(row: Response) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_lines(path: Path) -> list[Response]:
    if not path.is_file():
        return []
    content = path.read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]]


def _append(path: Path, rows: Sequence[Response]) -> None:
    """Add lines; the end of one that a killed process left is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(map(_line, rows)).encode())
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

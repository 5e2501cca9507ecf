"""What training leaves on disk -> the policies to compare."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from axolotl_mopo.config import ConfigError, DimensionsBlock
from axolotl_mopo.data.directives import inference_directive, with_directive
from axolotl_mopo.data.rows import Message
from axolotl_mopo.manifest import FILE_NAME

Kind = Literal["policy", "baseline", "reference"]

_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Policy:
    """A model to compare, as a folder or a model of the hub."""

    name: str
    path: str
    kind: Kind = "policy"
    base: str | None = None
    """The whole model that an adapter is of; None for a whole model."""
    reference: str | None = None
    """The model that it was trained from, where that is known."""
    tokenizer: str = ""
    """Where its tokenizer is, with the chat template that it was trained with."""
    digest: str = ""
    """A name made of its weights."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Its `mopo.json`, without versions; empty for a model of another method."""

    @property
    def whole(self) -> str:
        """The whole model to load."""
        return self.base or self.path

    @property
    def label(self) -> str:
        """Its weights, where it is one of several with different ones, or its name."""
        weights = self.manifest.get("weights") if self.kind == "policy" else None
        return ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) if weights else self.name

    def asked(self, messages: Sequence[Message], asking: "Asking") -> list[Message]:
        """What the policy is asked for a prompt: with AMoPO's directive for inference, as it was trained."""
        if "dimensions" not in self.manifest:
            return list(messages)
        settings = {name: self.manifest[name] for name in DimensionsBlock.model_fields if name in self.manifest}
        try:
            directive = inference_directive(DimensionsBlock.model_validate(settings), asking.dimension, asking.score)
        except ValueError as error:
            raise ConfigError(f"--dimension or --score: {self.name}: {error}") from None
        return with_directive(messages, directive)

    def to_json(self) -> dict[str, Any]:
        """Everything but the name."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    @classmethod
    def from_json(cls, name: str, content: dict[str, Any]) -> Self:
        """The policy of a name and what `to_json` gave."""
        return cls(name=name, **content)


@dataclass(frozen=True)
class Asking:
    """Which of AMoPO's prompts to use: the integrated one, or one dimension's at a score, by default the best."""

    dimension: str | None = None
    score: float | None = None


def check_name(name: str, what: str) -> str:
    """Hold a name that files and columns carry against what those allow.

    Raises:
        ConfigError: where it has other characters.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(
            f"the {what} {name!r} may hold letters, digits, `_`, `-` and `.`, and begins with one of the first"
        )
    return name


def find_policies(runs: Iterable[str], kind: Kind = "policy") -> list[Policy]:
    """The policies of some runs.

    Args:
        runs: each a sweep's folder, a run's, a checkpoint's, or a model of the hub; `NAME=...` gives a single model a
            name of its own.
        kind: of all of them.

    Raises:
        ConfigError: where a run has no model, or two have one name.
    """
    found = [(policy, "=" in run) for run in runs for policy in _of_run(run, kind)]
    counts = Counter(policy.name for policy, _ in found)
    policies = [
        policy
        if named or counts[policy.name] == 1
        else replace(policy, name=f"{Path(policy.path).resolve().parent.name}-{policy.name}")
        for policy, named in found
    ]
    if doubled := [name for name, count in Counter(policy.name for policy in policies).items() if count > 1]:
        raise ConfigError(f"two runs are called {doubled[0]}; give one another name, as NAME=PATH")
    return policies


def reference_policy(policies: Sequence[Policy], path: str | None) -> Policy:
    """The model that the policies were trained from.

    Args:
        policies: at least one.
        path: where the user says it.

    Raises:
        ConfigError: where the policies do not agree on one, or do not say it.
    """
    known = {policy.reference for policy in policies if policy.kind == "policy"}
    if path is None:
        if len(known) != 1 or None in known:
            said = ", ".join(sorted(name or "unknown" for name in known))
            raise ConfigError(
                f"the runs were trained from {said}; name one with --reference, or leave it out with none"
            )
        (path,) = known
    assert path is not None  # noqa: S101
    tokenizer = path if _has_tokenizer(Path(path)) else policies[0].tokenizer
    return Policy("reference", path, "reference", reference=path, tokenizer=tokenizer)


def _of_run(run: str, kind: Kind) -> list[Policy]:
    given, _, path = run.rpartition("=")
    if given:
        check_name(given, "run's name")
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.count("/") != 1:
            raise ConfigError(f"{path} is neither a folder nor a model of the hub")
        return [Policy(given or path.replace("/", "-"), path, kind, reference=None, tokenizer=path)]
    sweep = sorted(child for child in folder.glob("sweep*") if child.is_dir())
    if sweep and not given:
        return [_of_folder(child, child.name, kind) for child in sweep]
    return [_of_folder(folder, given or _name(folder), kind)]


def _of_folder(folder: Path, name: str, kind: Kind) -> Policy:
    model = folder if _has_model(folder) else _last_checkpoint(folder)
    manifest: dict[str, Any] = {}
    if (model / FILE_NAME).is_file():
        manifest = json.loads((model / FILE_NAME).read_text(encoding="utf-8"))
        manifest.pop("versions", None)
    base = None
    if (model / "adapter_config.json").is_file():
        base = json.loads((model / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    tokenizer = next((place for place in (model, folder) if _has_tokenizer(place)), None)
    return Policy(
        name,
        str(model),
        kind,
        base=base,
        reference=base or manifest.get("base_model"),
        tokenizer=str(tokenizer or base or model),
        manifest=manifest,
    )


def _name(folder: Path) -> str:
    folder = folder.resolve()
    name = f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
    return re.sub(r"[^\w.-]", "_", name)


def _has_model(folder: Path) -> bool:
    described = (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file()
    return described and any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _last_checkpoint(folder: Path) -> Path:
    checkpoints = [child for child in folder.glob("checkpoint-*") if _has_model(child)]
    if not checkpoints:
        raise ConfigError(
            f"{folder} has neither a model nor a checkpoint with one; wait until it is trained, or leave the run out"
        )
    return max(checkpoints, key=lambda child: int(child.name.removeprefix("checkpoint-")))

"""Find the policies to compare in the output folders of training runs."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from axolotl_mopo.config.model_files import ADAPTER, MANIFEST, AdapterConfig, Manifest
from axolotl_mopo.data.conversations import with_directive
from axolotl_mopo.data.rows import Message
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.evaluation.names import check_name, check_policies
from axolotl_mopo.evaluation.schema import PromptChoice
from axolotl_mopo.files import is_hub_name
from axolotl_mopo.records import read_record

Kind = Literal["policy", "baseline", "reference"]

_WEIGHTS = ("*.safetensors", "*.bin")
_LONGEST = 90
"""Maximum number of characters of a name derived from a folder's."""


@dataclass(frozen=True)
class Policy:
    """A model to compare: a folder or a model of the hub."""

    name: str
    path: str
    kind: Kind = "policy"
    base: str | None = None
    """The base model of an adapter; None for a whole model."""
    reference: str | None = None
    """The model that it was trained from, if known."""
    tokenizer: str = ""
    """Folder of its tokenizer, with the chat template used in training; or a model of the hub."""
    digest: str = ""
    """A digest of its weights."""
    manifest: Manifest | None = None
    """Its `mopo.json`, without versions; None for a model of another method."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template that it was trained with."""

    @property
    def whole(self) -> str:
        """The whole model to load."""
        return self.base or self.path

    @property
    def weights(self) -> dict[str, float] | None:
        """The weights of MODPO's objectives that it was trained with."""
        return self.manifest.weights if self.manifest else None

    @property
    def label(self) -> str:
        """MODPO's weights of a trained policy, otherwise its name."""
        if self.kind != "policy" or not self.weights:
            return self.name
        text = ", ".join(f"{name} {weight:g}" for name, weight in self.weights.items())
        return "".join(character if character.isprintable() else "?" for character in text)

    def asked(self, messages: Sequence[Message], asking: PromptChoice) -> list[Message]:
        """The messages that the policy gets for a prompt, with AMoPO's inference directive if it was trained with it.

        Raises:
            ConfigError: if it was not trained with the dimension or the score.
        """
        try:
            settings = self.manifest.prompt_settings() if self.manifest else None
        except ValueError as error:
            raise ConfigError(f"{Path(self.path) / MANIFEST}: {error}") from None
        if settings is None:
            return list(messages)
        try:
            directive = settings.inference_directive(asking.dimension, asking.score)
        except ValueError as error:
            raise ConfigError(f"--dimension or --score: {self.name}: {error}") from None
        return with_directive(messages, directive)

    def to_json(self) -> dict[str, Any]:
        """All fields except the name."""
        content = {key: value for key, value in vars(self).items() if key != "name"}
        return content | {"manifest": self.manifest and self.manifest.model_dump(mode="json")}


def find_policies(runs: Iterable[str], kind: Kind = "policy") -> list[Policy]:
    """Find the policies of some runs.

    Args:
        runs: folders of sweeps, runs or checkpoints, or models of the hub; `NAME=...` names a single model.
        kind: kind of all these policies.

    Raises:
        ConfigError: if a run has no model, or two have the same name.
    """
    found = [(policy, named) for run in runs for policy, named in _of_run(run, kind)]
    counts = Counter(policy.name for policy, _ in found)
    policies = [
        policy
        if named or counts[policy.name] == 1
        else replace(policy, name=_safe(f"{Path(policy.path).resolve().parent.name}-{policy.name}"))
        for policy, named in found
    ]
    check_distinct(policies)
    return policies


def check_distinct(policies: Iterable[Policy]) -> None:
    """Refuse policies that share a name or a file.

    Raises:
        ConfigError: if two policies share one; names them.
    """
    names = [policy.name for policy in policies]
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"two runs are called {doubled[0]}; give one another name, as NAME=PATH")
    try:
        check_policies(names)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def reference_policy(policies: Sequence[Policy], path: str | None, log: Callable[[str], None]) -> Policy | None:
    """Find the model that the policies were trained from.

    Args:
        policies: at least one policy.
        path: the user's choice, which must have weights; by default what the policies name.
        log: prints a line for the user: the reason if there is no reference.

    Returns:
        The reference; None if the policies were trained from a model without weights (`reinit_weights`).

    Raises:
        ConfigError: if the policies name different models or none.
    """
    if path is None:
        known = {policy.reference for policy in policies if policy.kind == "policy"}
        if len(known) != 1 or None in known:
            names = ", ".join(sorted(name or "unknown" for name in known))
            raise ConfigError(
                f"the runs were trained from {names}; choose one with --reference, or use --reference none"
            )
        (path,) = known
        assert path is not None  # noqa: S101
        if Path(path).is_dir() and not _has_model(Path(path)):
            log(
                f"The runs were trained from {path}, which has no weights (reinit_weights), so there is no reference: "
                "no KL and no win rates are shown. To compare with another model, name it with --reference."
            )
            return None
    require_weights(path, "--reference")
    # Use the chat template of the runs, since the reference's folder may have none.
    first = policies[0]
    return Policy(
        "reference",
        path,
        "reference",
        reference=path,
        tokenizer=first.tokenizer,
        chat_template_kwargs=first.chat_template_kwargs,
    )


def require_weights(path: str, where: str) -> None:
    """Refuse a local model without weights, and a path that is neither a folder nor a name on the hub.

    Raises:
        ConfigError: if it is one of these; the message begins with `where`.
    """
    folder = Path(path)
    if folder.is_dir() and not _has_model(folder):
        raise ConfigError(f"{where}: {path} has no weights; give the folder of a whole model with *.safetensors")
    if not folder.is_dir() and (folder.exists() or not is_hub_name(path)):
        raise ConfigError(f"{where}: {path!a} is neither a folder nor a model of the hub; check the path")


def _of_run(run: str, kind: Kind) -> list[tuple[Policy, bool]]:
    """The policies of a run, each with whether the user named it."""
    given, equals, path = run.partition("=")
    if not equals or Path(run).exists():  # a path may have `=` in it
        given, path = "", run
    if given:
        try:
            check_name(given)
        except ValueError as error:
            raise ConfigError(f"{run}: {error}") from None
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.count("/") != 1 or not is_hub_name(path):
            raise ConfigError(f"{path} is neither a folder nor a model of the hub; check the path")
        name = given or _safe(path.replace("/", "-"))
        return [(Policy(name, path, kind, reference=None, tokenizer=path), bool(given))]
    sweep = sorted(child for child in folder.iterdir() if child.name.startswith("sweep") and child.is_dir())
    if sweep and not given:
        return [(_of_folder(child, _safe(child.name), kind), False) for child in sweep]
    return [(_of_folder(folder, given or _name(folder), kind), bool(given))]


def _of_folder(folder: Path, name: str, kind: Kind) -> Policy:
    model = folder if _has_model(folder) else _last_checkpoint(folder)
    manifest = None
    if (model / MANIFEST).exists():
        content = read_record(Manifest, model / MANIFEST).model_dump()
        content.pop("versions", None)
        manifest = Manifest.model_validate(content)
    base = None
    if (model / ADAPTER).exists():
        base = _base_model(model / ADAPTER)
    tokenizer = next((place for place in (model, folder) if _has_tokenizer(place)), None)
    return Policy(
        name,
        str(model),
        kind,
        base=base,
        reference=base or (manifest.base_model if manifest else None),
        tokenizer=str(tokenizer or base or model),
        manifest=manifest,
        chat_template_kwargs=dict((manifest and manifest.chat_template_kwargs) or {}),
    )


def _base_model(path: Path) -> str:
    """The base model of an adapter; refuses one without weights."""
    config = read_record(AdapterConfig, path)
    if config.peft_type != "LORA":
        raise ConfigError(
            f"{path}, `peft_type`: it is {config.peft_type!a}, not LORA; merge the adapter into its base model and "
            "use the merged model"
        )
    if config.base_model_name_or_path is None:
        raise ConfigError(f"{path}, `base_model_name_or_path`: it is missing; name the base model there")
    require_weights(config.base_model_name_or_path, f"{path}, `base_model_name_or_path`")
    return config.base_model_name_or_path


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return _safe(f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name)


def _safe(name: str) -> str:
    """A folder's name with `_` for every character that a policy's name may not have."""
    name = re.sub(r"[^\w.-]", "_", name)[:_LONGEST]
    return name if name[:1].isalnum() or name[:1] == "_" else f"_{name}"


def _has_model(folder: Path) -> bool:
    described = (folder / ADAPTER).is_file() or (folder / "config.json").is_file()
    return described and any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _last_checkpoint(folder: Path) -> Path:
    checkpoints = [child for child in folder.glob("checkpoint-*") if _has_model(child)]
    numbered = [child for child in checkpoints if child.name.removeprefix("checkpoint-").isdecimal()]
    if not numbered:
        raise ConfigError(
            f"{folder} has neither a model nor a checkpoint with one; wait until it is trained, or remove the run"
        )
    return max(numbered, key=lambda child: int(child.name.removeprefix("checkpoint-")))

"""`source: adapter`: the implicit reward of a model that was trained on the preferences of another objective."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from axolotl_mopo.config.methods import METHODS, DimensionsConfig, MODPOConfig
from axolotl_mopo.config.model_files import ADAPTER, MANIFEST, AdapterConfig, Manifest, read_model_file
from axolotl_mopo.config.settings import Number
from axolotl_mopo.config.sources import ModelKind, Responses, RewardSource
from axolotl_mopo.digests import digest, model_digest
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.log import warn

if TYPE_CHECKING:
    from torch import Tensor

_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` that subtract the initial adapter from the base model's weights."""


class AdapterSource(RewardSource):
    """The reward is beta * (logp - reference_logp) of a LoRA adapter or a whole model trained by DPO or MODPO."""

    source: Literal["adapter"]
    path: str = Field(
        description=(
            "Model of the other objective: the folder of a LoRA adapter of the same base model, or a whole model."
        ),
    )
    beta: Number | None = Field(
        None,
        gt=0,
        description=(
            "Beta that this model was trained with (`rl_beta` of its DPO run); a positive number. Default: read from "
            "its mopo.json."
        ),
    )
    reference: str | None = Field(
        None,
        description="Reference model of a whole model. The reference of an adapter is always the base model.",
    )

    argument: ClassVar = "path"

    @property
    def model_paths(self) -> dict[str, ModelKind]:
        """See `RewardSource`."""
        return {"path": "adapter"} if self.reference is None else {"path": "model", "reference": "base"}

    @property
    def needs_base_model(self) -> bool:
        """True for an adapter, whose reference is the base model."""
        return self.reference is None

    def resolve(self, where: str, run: Mapping[str, Any]) -> Self:
        """Check the files of a local model, and read beta from its `mopo.json`; see `RewardSource`."""
        folder = Path(self.path)
        if (folder / ADAPTER).exists():
            self._check_adapter(where, run)
        elif folder.exists() and not (folder / "config.json").exists():
            raise ConfigError(
                f"{where}.path`: {folder} contains neither an adapter_config.json nor a config.json; give the folder "
                "of a LoRA adapter or of a whole model"
            )
        elif self.reference is None:
            raise ConfigError(
                f"{where}.path`: {self.path} is not the folder of a LoRA adapter. If it is a whole model, set "
                "`reference` to the model that it was trained from; otherwise correct the path"
            )
        for key, path in (("path", self.path), ("reference", self.reference)):
            if path is not None and not Path(path).exists():
                warn("%s.%s`: %s is not a local folder and is downloaded from the model hub.", where, key, path)
        beta = _recorded_beta(folder, where) if self.beta is None else self.beta
        if beta is None:
            raise ConfigError(
                f"{where}.beta` is missing, and there is no mopo.json in {folder} to read it from; set it to the "
                "beta that the model was trained with"
            )
        return self.model_copy(update={"beta": beta})

    def _check_adapter(self, where: str, run: Mapping[str, Any]) -> None:
        """Check the adapter's config, and the run that it is used in."""
        if self.reference is not None:
            raise ConfigError(
                f"{where}.reference` has no effect: the reference of an adapter is the base model; remove it"
            )
        if run.get("fsdp") or run.get("fsdp_config") or run.get("deepspeed"):
            raise ConfigError(
                f"{where}` is an adapter, which cannot be loaded into a model that FSDP or DeepSpeed shards; merge it "
                "with `axolotl merge-lora` and give the merged model and its `reference`"
            )
        config = read_model_file(AdapterConfig, Path(self.path) / ADAPTER, f"{where}.path`")
        if config.peft_type != "LORA":
            raise ConfigError(
                f"{where}.path`: {self.path} is an adapter of the type {config.peft_type}, not LORA; merge it into its "
                "base model and give the merged model and its `reference`"
            )
        if change := base_model_change(config.init_lora_weights, config.layer_replication):
            raise ConfigError(
                f"{where}.path`: {self.path} has {change}, which changes the weights of the base model that it is "
                "loaded into, so the base model is not its reference; save it again with PEFT's "
                "`path_initial_model_for_weight_conversion`, or merge it and give the merged model and its `reference`"
            )
        theirs, ours = config.base_model_name_or_path, run.get("base_model")
        if theirs and ours and not _same_model(theirs, str(ours)):
            warn(
                "%s.path`: %s was trained on the base model %s, but the base model of this run is %s; its rewards are "
                "meaningful only if the two are the same.",
                where,
                self.path,
                theirs,
                ours,
            )

    def content_digest(self) -> str:
        """Return a digest of the files of the model and of its reference."""
        reference = self.reference and model_digest(self.reference)
        return digest([model_digest(self.path), reference, "the tokens that were drawn"])

    def rewards(self, responses: Responses) -> "Tensor":
        """See `RewardSource`. The implicit reward of a DPO-trained model: arXiv 2305.18290, section 4."""
        assert self.beta  # noqa: S101 (filled in by `resolve`)
        return self.beta * (responses.logps(self.path) - responses.reference_logps(self.path, self.reference))


def base_model_change(init_lora_weights: Any, layer_replication: Any) -> str | None:
    """Return the LoRA setting that changes the base model's weights when the adapter is loaded, if there is one."""
    if str(init_lora_weights).lower().startswith(_CHANGES_THE_BASE):
        return f"`init_lora_weights: {init_lora_weights}`"
    return "`layer_replication`" if layer_replication else None


def _same_model(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def _recorded_beta(folder: Path, where: str) -> float | None:
    """Read beta from the `mopo.json` next to the model, or in the output folder of the run whose checkpoint it is.

    Raises:
        ConfigError: if that run had no reference model, which an implicit reward needs.
    """
    for path in (folder / MANIFEST, folder.parent / MANIFEST):
        if path.exists():
            manifest = read_model_file(Manifest, path, f"{where}.path`")
            if issubclass(METHODS.get(manifest.method, MODPOConfig), DimensionsConfig):
                raise ConfigError(
                    f"{where}.beta`: {path} belongs to a run of `rl: {manifest.method}`, which has no reference model "
                    "and so no implicit reward; give an adapter trained by DPO or `rl: modpo`"
                )
            return manifest.beta
    return None

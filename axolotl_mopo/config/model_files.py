"""JSON files in a model's folder: `mopo.json`, `adapter_config.json`, `config.json`."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, PositiveInt, ValidationError

from axolotl_mopo.config.directives import PromptSettings
from axolotl_mopo.config.methods import METHODS
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.records import Record, explain, read_record

MANIFEST = "mopo.json"
ADAPTER = "adapter_config.json"

R = TypeVar("R", bound=Record)


class Manifest(Record):
    """`mopo.json`: the method and settings that a model was trained with."""

    model_config = ConfigDict(extra="allow")

    method: str
    base_model: str | None = None
    beta: Annotated[float, Field(gt=0)] | None = None
    weights: dict[str, float] | None = None
    """Weights of MODPO's objectives."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template; None if the run set none."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the method."""
        return self.model_extra or {}

    def prompt_settings(self) -> PromptSettings | None:
        """The settings of the prompts; None if the method does not have one for each dimension.

        Raises:
            ValueError: if the settings are invalid.
        """
        method = METHODS.get(self.method)
        if method is None or not issubclass(method, PromptSettings):
            return None
        names = PromptSettings.model_fields
        try:
            return PromptSettings.model_validate({key: self.settings[key] for key in names if key in self.settings})
        except ValidationError as error:
            raise ValueError(explain(error).lstrip(",: ")) from None


class AdapterConfig(Record):
    """`adapter_config.json` of PEFT: the keys that PEFT uses without validating them."""

    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    r: PositiveInt | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    bias: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = None
    layer_replication: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = None
    megatron_config: None = None


class ModelConfig(Record):
    """The keys of a model's `config.json` that are read without loading the model."""

    architectures: list[str] | None = None
    id2label: dict[str, str | int | float] | None = None
    """Names of the scores by index."""


def read_model_file(kind: type[R], path: Path, where: str) -> R:
    """Read one of these files.

    Args:
        kind: schema of the file.
        path: path of the file.
        where: name of the file in messages.

    Raises:
        ConfigError: if the file cannot be read or does not match the schema.
    """
    try:
        return read_record(kind, path)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None

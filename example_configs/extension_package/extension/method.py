"""A method: its block in the YAML, and where its trainer is."""

from typing import ClassVar

from pydantic import BaseModel, Field

from axolotl_mopo.config import METHODS, DimensionsConfig, Number


class TchebycheffConfig(DimensionsConfig):
    """The `tchebycheff:` block."""

    rl: ClassVar = "tchebycheff"
    trainer: ClassVar = "extension.trainer.TchebycheffTrainer"

    beta: Number = Field(2.0, gt=0, description="a positive number")
    mu: Number = Field(0.1, gt=0, description="a positive number; the smaller, the more the worst dimension counts")


METHODS["tchebycheff"] = TchebycheffConfig


class ExtensionArgs(BaseModel):
    """The field that the block is in Axolotl's configuration."""

    tchebycheff: TchebycheffConfig | None = None

"""The named variants of the methods, declared once: `losses` computes them, the configuration offers them."""

from typing import Literal

MODPOLossType = Literal["sigmoid", "hinge"]
AMoPOLossType = Literal["simpo", "orpo"]
DrawScheme = Literal["gaussian", "mean"]
WeightingScheme = Literal[DrawScheme, "uniform"]

"""Named variants of the methods, declared once: the configuration offers them, `losses` computes them."""

from typing import Literal

MODPOLossType = Literal["sigmoid", "hinge"]
AMoPOLossType = Literal["simpo", "orpo"]
DrawScheme = Literal["gaussian", "mean"]
WeightingScheme = Literal[DrawScheme, "uniform"]

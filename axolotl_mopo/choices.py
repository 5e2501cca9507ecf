"""Named variants of the methods and of the data, declared once for the configuration and for the code that has them."""

from typing import Literal

MODPOLossType = Literal["sigmoid", "hinge"]
AMoPOLossType = Literal["simpo", "orpo"]
DrawScheme = Literal["gaussian", "mean"]
WeightingScheme = Literal[DrawScheme, "uniform"]
Completion = Literal["all", "answer"]
"""What is trained on of an assistant turn: all of it, or the answer without the reasoning before it."""
Turns = Literal["all", "last"]
"""Which assistant turns of a response are trained on."""

"""Randomness of a model in training, which would be mistaken for a preference."""

import re

from torch import nn

_NOISE = re.compile(r"dropout|drop_?path|layer_?drop|^(input_)?jitter_noise$|^moe_jitter_eps$")
"""Attributes of modules that scale noise; Phi-3.5-MoE's `router_jitter_noise` is a threshold in evaluation as well."""


def turn_off_noise(model: nn.Module) -> None:
    """Set every dropout and router noise of a model to 0, in place; what its configuration says stays.

    transformers' layers keep the dropout of their attention as a number, not as an `nn.Dropout`.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _NOISE.search(name):
                setattr(module, name, 0.0)

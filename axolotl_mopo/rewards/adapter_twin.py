"""Temporarily puts a LoRA adapter on the policy's base model, in a second set of modules around the same weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from peft import PeftModel, load_peft_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from axolotl_mopo.digests.weights import PEFT_WRAPPERS, tensor_digests
from axolotl_mopo.errors import ConfigError
from axolotl_mopo.rewards.loading import readable_weights

_PREFIX = "base_model.model."


@contextmanager
def with_adapter(model: nn.Module, path: str) -> Iterator[Any]:
    """Context manager that yields the base model of `model` with the adapter at `path`; `model` does not change.

    Only the adapter's own tensors need additional memory.

    Args:
        model: the unwrapped policy; its own adapters are ignored.
        path: the adapter's folder.

    Yields:
        The twin of the base model, in evaluation mode.

    Raises:
        ConfigError: if the adapter does not fit the base model, or its weights cannot be read.
    """
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    base = bare_twin(model.get_base_model() if isinstance(model, PeftModel) else model)
    with readable_weights(path):
        _own_tensors(base, path)
    try:
        try:
            with readable_weights(path):
                PeftModel.from_pretrained(base, path, is_trainable=False).eval()
        except ConfigError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the adapter {path} does not fit the base model: {error}; give an adapter of this run's base model"
            ) from error
        yield base
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


@contextmanager
def unchanged(model: nn.Module, path: str) -> Iterator[None]:
    """Context manager that checks that the parameters and buffers of a model do not change.

    Raises:
        RuntimeError: if they change; names those that differ.
    """
    before = _state(model)
    yield
    after = _state(model)
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise RuntimeError(
            f"the adapter {path} changed {', '.join(changed)} of the policy; merge it with `axolotl merge-lora` and "
            "give the merged model and its `reference`"
        )


def _state(model: nn.Module) -> dict[str, str]:
    return tensor_digests([*model.named_parameters(), *model.named_buffers()])


def bare_twin(model: nn.Module) -> Any:
    """Return a second set of modules around the same parameters and buffers, without adapters.

    Changes to the twin's modules (wrapped layers, added hooks, replaced tensors) do not change the model.
    """
    twins: dict[nn.Module, nn.Module] = {}
    twin = _twin(model, twins)
    for copied in twins.values():
        for name, value in vars(copied).items():
            if name == "forward" and not isinstance(value, MethodType | partial):
                raise RuntimeError(
                    f"the forward method of {type(copied).__name__} is replaced by a {type(value).__name__}, which "
                    "cannot be copied; merge the adapter with `axolotl merge-lora` and give the merged model and its "
                    "`reference`"
                )
            vars(copied)[name] = _rebound(value, twins)
    vars(twin).pop("peft_config", None)
    return twin


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    module = _bare(module)
    if module not in twins:
        twins[module] = twin = copy.copy(module)
        for name, value in vars(twin).items():
            if isinstance(value, dict | list | set):  # parameters, buffers, modules, hooks
                vars(twin)[name] = copy.copy(value)
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _twin(child, twins)
    return twins[module]


def _bare(module: nn.Module) -> nn.Module:
    """Return the base model's own module inside PEFT's wrappers."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def _rebound(value: Any, twins: dict[nn.Module, nn.Module]) -> Any:
    """Replace references to modules by references to their twins."""
    match value:
        case nn.Module():
            return twins.get(_bare(value), value)
        case MethodType():
            return MethodType(value.__func__, _rebound(value.__self__, twins))
        case partial():
            return partial(
                _rebound(value.func, twins), *(_rebound(part, twins) for part in value.args), **value.keywords
            )
        case _:
            return value


def _own_tensors(base: nn.Module, path: str) -> None:
    """Copy the tensors of the base model that the adapter's file contains, since loading it overwrites them."""
    names = {_name_in_base(name) for name in load_peft_weights(path, device="cpu")}
    tensors = [*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False)]
    copies: dict[Tensor, Tensor] = {tensor: _copied(tensor) for name, tensor in tensors if name in names}
    for module in base.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor in copies:
                    own[name] = copies[tensor]  # type: ignore[assignment]


def _name_in_base(name: str) -> str:
    return ".".join(part for part in name.removeprefix(_PREFIX).split(".") if part not in PEFT_WRAPPERS)


def _copied(tensor: Tensor) -> Tensor:
    own = tensor.detach().clone()
    return nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own

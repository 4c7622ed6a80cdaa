"""Devices that any machine has: tensors that say they are elsewhere, and refuse to meet those of another place.

The numbers are computed on the CPU; what is checked is that nothing is mixed that a real machine could not mix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

FIRST, SECOND = torch.device("cpu:1"), torch.device("cpu:2")
"""Places that differ from each other and from where tensors of the CPU are (``cpu``, without a number)."""

MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Placed(Tensor):
    """A tensor of the CPU that says it is on another device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        placed: Placed = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=device
        )
        placed.inner = inner
        return placed

    def tolist(self) -> Any:
        """The numbers as a list: torch refuses it to tensors of a class of their own."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Within the context, tensors can be made on and moved to the devices of this module."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
    asked = kwargs.get("device")
    places = {tensor.device for tensor in tensors if tensor.ndim or isinstance(tensor, Placed)}
    if func not in MOVES and len(places) > 1:
        raise RuntimeError(f"expected all tensors to be on the same device, but {func} got {places}")
    target = asked if asked is not None else next(iter(places), torch.device("cpu"))
    if func is torch.ops.aten.copy_.default:
        target = args[0].device
    kwargs = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    plain = tree_map(lambda item: item.inner if isinstance(item, Placed) else item, (args, kwargs))
    result = func(*plain[0], **plain[1])
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if torch.device(target) not in (FIRST, SECOND):
        return result
    return tree_map(lambda item: Placed(item, torch.device(target)) if isinstance(item, Tensor) else item, result)


def place_(module: nn.Module, device: torch.device) -> None:
    """Move a module's parameters and buffers."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Placed(parameter.detach(), device), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Placed(buffer, device)


def plain(tensor: Tensor) -> Tensor:
    """The numbers."""
    return tensor.inner if isinstance(tensor, Placed) else tensor

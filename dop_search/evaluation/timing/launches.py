"""What a forward asks of an accelerator: kernels that are launched, and places where the host waits for it.

Counted on a CPU, so that no GPU is needed: an operation that torch dispatches is a kernel, unless it is a view or an
allocation. Those that an accelerator computes at once, though a CPU takes several, are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten
FUSED = {aten.linear.default, aten.rms_norm.default, aten.layer_norm.default, aten.scaled_dot_product_attention.default}
"""One kernel each on an accelerator."""
NO_KERNEL = (
    "detach_",
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "alias",
)
WAITS = {
    *("item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "equal", "allclose", "unique", "unique_consecutive"),
    *("masked_select", "repeat_interleave", "__bool__", "__int__", "__float__", "__index__", "__array__"),
}
"""Methods of tensors and functions whose result the host has to know, be it its size only."""


class Launches(TorchDispatchMode):
    """Counts kernels by the name of their operation; to be entered under ``torch.inference_mode()``."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All kernels."""
        return self.by_name.total()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in FUSED:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in NO_KERNEL:
            self.by_name[name] += 1
        return func(*args, **kwargs)


class HostWaits(TorchFunctionMode):
    """Counts calls by name for which the host would wait for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name == "__getitem__" and any(
            isinstance(item, Tensor) and item.dtype == torch.bool
            for item in (args[1] if isinstance(args[1], tuple) else args[1:])
        )
        if name in WAITS or by_mask:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))

"""Linear layers on a CPU through oneDNN, where that beats the BLAS that torch uses by default.

For float32 torch multiplies by its BLAS, which on some processors leaves half of the vector width unused; oneDNN,
which every build of torch carries, does not. Results agree to float32 rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from dop_search.utils.attached import replace_attribute

MIN_ROWS = 64
"""Below so many rows the call's overhead outweighs the gain."""
MIN_SPEEDUP = 1.15


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def available() -> bool:
    """Whether this build of torch has the operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def measured_speedup(width: int = 256, num_rows: int = 1024, rounds: int = 9) -> float:
    """Time of torch's default divided by oneDNN's, for one matrix product, as measured here and now (some ms)."""
    rows, weight = torch.randn(num_rows, width), torch.randn(width, width)

    def best(multiply: Callable[[Tensor, Tensor, None], Tensor]) -> float:
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            multiply(rows, weight, None)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    with torch.inference_mode():
        return best(nn.functional.linear) / best(_onednn)


@contextmanager
def fast_linear(model: nn.Module) -> Iterator[int]:
    """Within the context, float32 linear layers on the CPU run through oneDNN if it is faster on this machine.

    Yields:
        How many layers were switched; 0 where there is nothing to gain.
    """
    linears = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter  # torchao packs weights in place
        if module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
    ]
    if not linears or not available() or measured_speedup() < MIN_SPEEDUP:
        linears = []
    with ExitStack() as undo:
        for linear in linears:
            replace_attribute(undo, linear, "forward", _forward_of(linear))
        yield len(linears)


def _forward_of(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(rows: Tensor) -> Tensor:
        if torch.is_grad_enabled() or rows.numel() < MIN_ROWS * linear.in_features:
            return nn.functional.linear(rows, linear.weight, linear.bias)
        return _onednn(rows, linear.weight, linear.bias)

    return forward

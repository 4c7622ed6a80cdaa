"""Live bytes of tensors on the CPU, as torch's own allocator reports them to its profiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


class Peak:
    """The most bytes that were allocated within the context and alive at the same time."""

    num_bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Its ``num_bytes`` are known when the context has been left."""
    peak, live = Peak(), 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield peak
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak.num_bytes = max(peak.num_bytes, live)

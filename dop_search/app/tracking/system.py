"""What the machine does during a search, as MLflow measures it: kept beside the record, logged with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dop_search.app.config import TrackingConfig
from dop_search.app.tracking.values import Point

SYSTEM_FILE = "system.jsonl"
"""A line per moment: ``{"time_ms": …, "cpu_utilization_percentage": …}``."""
INTERVAL_S = 5.0


@contextmanager
def system_metrics(config: TrackingConfig, run_dir: Path, interval_s: float = INTERVAL_S) -> Iterator[None]:
    """While entered, write the load of CPU, memory, disk, network and GPUs to ``run_dir``, if that is asked for."""
    if config.backend == "none" or not config.system_metrics:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(run_dir / SYSTEM_FILE, interval_s, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def read_system_metrics(run_dir: Path) -> list[Point]:
    """The lines of the file, none if it is not there."""
    path = run_dir / SYSTEM_FILE
    moments = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        (f"system/{name}", value, step, moment["time_ms"])
        for step, moment in enumerate(moments)
        for name, value in moment.items()
        if name != "time_ms"
    ]


def _watch(path: Path, interval_s: float, stop: threading.Event) -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # no NVIDIA GPU, or no nvidia-ml-py
        monitors.append(GPUMonitor())
    with path.open("w", buffering=1) as file:
        while True:
            moment: dict[str, float] = {"time_ms": int(time.time() * 1000)}
            for monitor in monitors:
                monitor.collect_metrics()
                moment |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            file.write(json.dumps(moment) + "\n")
            if stop.wait(interval_s):
                return

"""Sweeps on the engines that people have: a real Slurm of one node, a real Ray cluster of two; skipped without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.one_node_slurm import missing_programs, one_node_slurm

from dop_search.app.record import Record

pytestmark = pytest.mark.slow

TINY = (
    *("experiment=smoke", "eval=none", "data.num_samples=2", "data.num_heldout=2", "data.num_test=0"),
    *("space.num_depth_levels=2", "space.num_token_levels=2", "search.num_rerank=1", "num_threads=1"),
)


def sweep(folder: Path, environment: dict[str, str], *overrides: str) -> tuple[list[Record], int]:
    """Records and tracked searches of a first sweep of two runs into a new store."""
    store = f"sqlite:///{folder / 'mlflow.db'}"
    places = (f"cache_dir={folder / 'cache'}", f"hydra.sweep.dir={folder / 'sweep'}", f"tracking.uri={store}")
    command = [sys.executable, "-m", "dop_search.app.cli.search", "-m", *TINY, "tracking=mlflow", *places, *overrides]
    done = subprocess.run(
        [*command, "space=dop,uniform"],
        cwd=folder,
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs([item.experiment_id for item in client.search_experiments()], max_results=1000)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return [Record.load(path) for path in sorted(folder.glob("sweep/**/record.json"))], len(parents)


@pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of a Slurm of one's own need root")
@pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())} (Slurm, munge)")
def test_slurm_without_gpus_runs_a_first_sweep_and_loses_no_run(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    small = ("gpus_per_node=null", "mem_gb=1", "cpus_per_task=1", "timeout_min=5", "setup=['export DOP_SETUP=1']")
    with one_node_slurm(tmp_path / "slurm") as environment:
        records, tracked = sweep(
            tmp_path, environment, "hydra/launcher=slurm", *(f"hydra.launcher.{key}" for key in small)
        )
    assert [record.space.name for record in records] == ["dop", "uniform"]
    assert tracked == 2


@contextmanager
def two_ray_nodes(folder: Path) -> Iterator[str]:
    """A head and a second node on this host; yields the cluster's address."""
    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert ray is not None
    address = "127.0.0.1:6399"
    options = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    head = ["--head", "--port=6399", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    try:
        for role in ([*head, f"--temp-dir={folder}"], [f"--address={address}"]):
            subprocess.run([ray, "start", *role, *options], check=True, capture_output=True, text=True)
        yield address
    finally:
        subprocess.run([ray, "stop", "--force"], check=False, capture_output=True)


def test_ray_joins_a_running_cluster_and_loses_no_run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="the extra `ray` is not installed")
    short = Path("/tmp") / f"ray{os.getpid()}"  # sockets have short paths
    remote = ("remote.num_gpus=0", "remote.num_cpus=1")
    with two_ray_nodes(short) as address:
        environment = {"RAY_ADDRESS": address}
        records, tracked = sweep(
            tmp_path,
            environment,
            "hydra/launcher=ray_gpu",
            "hydra.launcher.ray.init.address=auto",
            *(f"hydra.launcher.ray.{key}" for key in remote),
        )
    shutil.rmtree(short, ignore_errors=True)
    assert [record.space.name for record in records] == ["dop", "uniform"]
    assert tracked == 2

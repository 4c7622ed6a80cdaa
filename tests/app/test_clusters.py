"""First sweeps into a new store on the engines that people have: processes, a real Slurm, a real Ray cluster.

``pytest --sweeps=5 -k first_sweep -n 0`` repeats each, with four runs instead of two.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.one_node_slurm import missing_programs, one_node_slurm
from support.pictures import UNDRAWN, WITH_SUPPORT

from dop_search.app.record import Record

pytestmark = pytest.mark.slow

TINY = (
    *("experiment=smoke", "eval=none", "data.num_samples=2", "data.num_heldout=2", "data.num_test=0"),
    *("space.num_depth_levels=2", "space.num_token_levels=2", "search.num_rerank=1", "num_threads=1", UNDRAWN),
)
SLURM = ("gpus_per_node=null", "mem_gb=1", "cpus_per_task=1", "timeout_min=30", "setup=['export DOP_SETUP=1']")
RAY = ("ray.init.address=auto", "ray.remote.num_gpus=0", "ray.remote.num_cpus=1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--sweeps")))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm of one node: what its commands need in the environment."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra `slurm` is not installed")
    if os.geteuid() != 0:
        pytest.skip("the daemons of a Slurm of one's own need root")
    if missing_programs():
        pytest.skip(f"not installed: {', '.join(missing_programs())} (Slurm, munge)")
    with one_node_slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of a head and a second node on this host: how it is found."""
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="the extra `ray` is not installed")
    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert ray is not None
    address, folder = "127.0.0.1:6399", Path("/tmp") / f"ray{os.getpid()}"  # sockets have short paths
    options = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    head = ["--head", "--port=6399", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    try:
        for role in ([*head, f"--temp-dir={folder}"], [f"--address={address}"]):
            subprocess.run(
                [ray, "start", *role, *options], env=WITH_SUPPORT, check=True, capture_output=True, text=True
            )
        yield {"RAY_ADDRESS": address}
    finally:
        subprocess.run([ray, "stop", "--force"], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def check_first_sweep(
    request: pytest.FixtureRequest, folder: Path, environment: dict[str, str], *launcher: str
) -> None:
    """Sweep into a new store; every run has a record, and is tracked with a nested run for its budget."""
    store = f"sqlite:///{folder / 'mlflow.db'}"
    places = (f"cache_dir={folder / 'cache'}", f"hydra.sweep.dir={folder / 'sweep'}", f"tracking.uri={store}")
    seeds = (0, 1) if request.config.getoption("--sweeps") > 1 else (0,)
    swept = ("space=dop,uniform", f"seed={','.join(map(str, seeds))}", *launcher)
    command = [sys.executable, "-m", "dop_search.app.cli.search", "-m", *TINY, "tracking=mlflow", *places, *swept]
    done = subprocess.run(
        command, cwd=folder, env={**WITH_SUPPORT, **environment}, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = [Record.load(path) for path in folder.glob("sweep/**/record.json")]
    assert sorted(record.space.name for record in records) == sorted(["dop", "uniform"] * len(seeds))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs([item.experiment_id for item in client.search_experiments()], max_results=1000)
    parents = [run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 2 * len(seeds)
    assert sorted(run.data.tags["mlflow.parentRunId"] for run in runs if run.info.run_id not in parents) == sorted(
        parents
    )
    assert all(run.info.status == "FINISHED" for run in runs)


def test_a_first_sweep_by_processes_loses_no_run(request: pytest.FixtureRequest, tmp_path: Path, number: int) -> None:
    check_first_sweep(request, tmp_path, {}, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


@pytest.mark.service("Slurm")
def test_a_first_sweep_by_slurm_without_gpus_loses_no_run(
    request: pytest.FixtureRequest, slurm: dict[str, str], tmp_path: Path, number: int
) -> None:
    options = [f"hydra.launcher.{key}" for key in SLURM]
    check_first_sweep(request, tmp_path, slurm, "hydra/launcher=slurm", *options)


@pytest.mark.service("Ray")
def test_a_first_sweep_by_a_running_ray_cluster_loses_no_run(
    request: pytest.FixtureRequest, ray_cluster: dict[str, str], tmp_path: Path, number: int
) -> None:
    options = [f"hydra.launcher.{key}" for key in RAY]
    check_first_sweep(request, tmp_path, ray_cluster, "hydra/launcher=ray_gpu", *options)

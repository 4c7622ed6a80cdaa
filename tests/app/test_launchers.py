"""Sweeps: real ones with the launchers of one machine, and configurations for those of clusters."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from support.command_line import exit_status

from dop_search.app.cli.search import main
from dop_search.app.record import Record
from dop_search.utils.conf import CONFIG_NAME, config_dir

TINY = (
    *("experiment=smoke", "eval=none", "data.num_samples=2", "data.num_heldout=2", "data.num_test=0"),
    *("space.num_depth_levels=2", "space.num_token_levels=2", "search.num_rerank=1", "num_threads=1"),
)


def sweep(folder: Path, *arguments: str) -> list[Record]:
    """The records of ``dop-search -m ARGUMENTS``, in the order of its jobs."""
    places = (f"cache_dir={folder / 'cache'}", f"hydra.sweep.dir={folder / 'sweep'}")
    assert exit_status(main, "dop-search", "-m", *TINY, *places, *arguments) == 0
    jobs = sorted((path.parent for path in folder.glob("sweep/**/record.json")), key=lambda path: int(path.name))
    return [Record.load(job) for job in jobs]


@pytest.mark.slow
def test_a_sweep_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records = sweep(tmp_path, "space=dop,uniform", "budget=0.4", "seed=3")
    assert [(record.space.name, record.results[0].budget.plain) for record in records] == [
        ("dop", 0.4),
        ("uniform", 0.4),
    ]
    assert all(record.results[0].flops_ratio <= 0.4 for record in records)
    assert len({record.data.fingerprints["search"] for record in records}) == 1


@pytest.mark.parametrize(
    ("option", "override", "module", "name", "expected"),
    [
        (
            "slurm",
            "partition=gpu",
            "hydra_plugins.hydra_submitit_launcher.submitit_launcher",
            "SlurmLauncher",
            {"params.partition": "gpu", "params.gpus_per_node": 1},
        ),
        (
            "ray_gpu",
            "ray.init.address=auto",
            "hydra_plugins.hydra_ray_launcher.ray_launcher",
            "RayLauncher",
            {"ray_cfg.init.address": "auto", "ray_cfg.remote.num_gpus": 1},
        ),
    ],
)
def test_a_clusters_launcher_takes_every_key(
    option: str, override: str, module: str, name: str, expected: dict[str, object]
) -> None:
    launchers = pytest.importorskip(module)
    overrides = ["experiment=smoke", f"hydra/launcher={option}", f"hydra.launcher.{override}"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose(CONFIG_NAME, overrides, return_hydra_config=True)
    made = instantiate(config.hydra.launcher)
    assert isinstance(made, getattr(launchers, name))
    keys = OmegaConf.create({part: dict(getattr(made, part)) for part in {key.split(".")[0] for key in expected}})
    assert {key: OmegaConf.select(keys, key) for key in expected} == expected

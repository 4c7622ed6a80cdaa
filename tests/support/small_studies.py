"""Studies as their experiment configures them, on a few samples and in the test's own folders."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from dop_search.app.config import SearchConfig, parse_config
from dop_search.utils.conf import CONFIG_NAME, config_dir

SMALL = (
    "budget=[0.3]",
    "data.num_samples=2",
    "data.num_heldout=3",
    "data.num_test=4",
    "space.num_depth_levels=3",
    "space.num_token_levels=3",
    "++study.workers=1",
    "tracking=none",
)

STUDY_EXPERIMENTS = [
    path.stem for path in sorted((config_dir() / "experiment").glob("*.yaml")) if "\nstudy:" in path.read_text()
]
"""Experiment files of studies."""
PUBLISHED = [
    name
    for name in STUDY_EXPERIMENTS
    if re.search(r"^  published: (?!null)", (config_dir() / "experiment" / f"{name}.yaml").read_text(), re.M)
]
"""Those with a committed result that their command begins with."""

StudyRunner = Callable[..., dict[str, Any]]


def study_config(name: str, folder: Path, *overrides: str) -> SearchConfig:
    """``dop-search experiment=NAME`` on a few samples; later overrides win."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        places = (f"study.folder={folder / 'out'}", "study.published=null", f"cache_dir={folder / 'cache'}")
        return parse_config(compose(CONFIG_NAME, [f"experiment={name}", *SMALL, *places, *overrides]))


def check_that_a_rerun_measures_nothing(run: StudyRunner, folder: Path, name: str, *overrides: str) -> None:
    """The same study again, in the same folder, leaves ``result.json`` as it is."""
    result = folder / "out" / "result.json"
    before = result.read_text()
    run(name, *overrides)
    assert result.read_text() == before

"""The table of claims is what the committed records say."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from support.small_studies import StudyRunner

from dop_search.app.config import parse_config
from dop_search.app.results import plain
from dop_search.utils.conf import CONFIG_NAME, config_dir
from dop_search.utils.errors import ConfigError
from experiments.claims.study import CLAIMS, collect, markdown

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_the_committed_table_is_made_from_the_committed_records() -> None:
    rows = plain(collect(EXPERIMENTS))
    committed = json.loads((EXPERIMENTS / "claims" / "result.json").read_text())
    assert committed["rows"] == rows, (
        "run `dop-search experiment=claims study.folder=experiments/claims` and copy its table into the README"
    )
    assert markdown(committed) in (EXPERIMENTS / "claims" / "README.md").read_text()
    assert [row["claim"] for row in rows] == [claim["claim"] for claim in CLAIMS]


def test_the_study_writes_these_rows(run_small_study: StudyRunner) -> None:
    result = run_small_study("claims", f"study.options.experiments={EXPERIMENTS}")
    assert result["rows"] == plain(collect(EXPERIMENTS))


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: str(claim["claim"]))
def test_the_command_of_a_claim_suits_every_model_that_it_names(claim: dict[str, Any]) -> None:
    """Families without a CLS token need another selector than the default, and a study one copy of a large model."""
    name, *words = shlex.split(claim["command"])
    if name != "dop-search":
        return
    key, _, models = next(word for word in words if word.startswith("model=")).partition("=")
    others = [word for word in words if word not in ("-m", f"{key}={models}")]
    for model in models.split(","):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = parse_config(compose(CONFIG_NAME, [f"model={model}", *others]))
        says = (config_dir() / "model" / f"{model}.yaml").read_text()
        reads_cls = {config.selector.name, *config.selector.also} & {"cls_attention", "vispruner"}
        assert not reads_cls or "no CLS token" not in says
        assert config.study is None or config.study.workers == 1


def test_a_missing_record_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run `dop-search experiment=compare study.folder=.*compare` first"):
        collect(tmp_path)

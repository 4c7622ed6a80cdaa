"""Code outside of this repository: modules that the commands import before anything is looked up by name."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from support.command_line import exit_status
from support.pictures import unrendered

from dop_search.app import study_run
from dop_search.app.cli.bench import main as bench
from dop_search.app.cli.evaluate import main as evaluate
from dop_search.app.cli.search import main as search
from dop_search.app.config import SearchConfig, parse_config
from dop_search.app.record import Record
from dop_search.app.results import read_result
from dop_search.baselines import BASELINES, baseline
from dop_search.baselines.uniform import UniformReduction
from dop_search.search import SOLVERS
from dop_search.selectors import SELECTORS
from dop_search.utils.conf import CONFIG_NAME, config_dir
from dop_search.utils.errors import ConfigError

__all__ = ["unrendered"]  # no test here looks at pictures

MODULE = """
from dataclasses import dataclass, replace

import numpy as np

from dop_search.search import SOLVERS, additive_exact, uniform_strategy
from dop_search.selectors import SELECTORS
from dop_search.selectors.base import Selector, descending


@dataclass(frozen=True)
class FeatureNormSelector(Selector):
    name = "feature_norm"
    requires = frozenset({"features"})
    power: float = 2.0

    def rank(self, inputs, num_kept=None):
        return descending(inputs.tensor("features").float().norm(p=self.power, dim=-1))


SELECTORS[FeatureNormSelector.name] = FeatureNormSelector


def dearest(problem, budget, num_tries: int = 3):
    found = additive_exact(problem, budget)
    return replace(found, strategy=uniform_strategy(problem, budget), kl_additive=float(num_tries), solver="dearest")


SOLVERS["dearest"] = dearest
"""
TINY = (
    *("experiment=smoke", "eval=none", "data.num_samples=2", "data.num_heldout=2", "data.num_test=0"),
    *("space.num_depth_levels=2", "space.num_token_levels=2", "search.num_rerank=1", "num_threads=1"),
    "tracking=none",
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with a selector, in a folder on the path; nothing of it stays."""
    before = [(registry, dict(registry)) for registry in (SELECTORS, SOLVERS)]
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "somewhere" / "my_selectors.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "somewhere")
    yield "my_selectors"
    sys.modules.pop("my_selectors", None)
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def config(*overrides: str) -> SearchConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return parse_config(compose(CONFIG_NAME, list(overrides)))


@pytest.mark.slow
def test_a_search_with_a_selector_of_ones_own(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = (f"imports=[{module}]", "selector.name=feature_norm", "+selector.options.power=1")
    assert exit_status(search, "dop-search", *TINY, *own, "space=uniform", "hydra.run.dir=run") == 0
    (result,) = Record.load(tmp_path / "run").results
    assert (result.strategy.selector, result.strategy.selector_options) == ("feature_norm", {"power": 1})
    assert isinstance(baseline("feature_norm"), UniformReduction)
    assert "feature_norm" not in BASELINES


@pytest.mark.slow
def test_a_search_with_a_solver_of_ones_own(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its solution is measured and confirmed as any other, and its options are in the record."""
    monkeypatch.chdir(tmp_path)
    own = (f"imports=[{module}]", "search=own", "search.solver=dearest", "+search.num_tries=5")
    tiny = [word for word in TINY if not word.startswith("search.")]
    assert exit_status(search, "dop-search", *tiny, *own, "hydra.run.dir=run") == 0
    record = Record.load(tmp_path / "run")
    assert (record.solver.name, record.solver.options) == ("dearest", {"num_tries": 5})
    (result,) = record.results
    assert result.kl_additive == 5.0
    assert result.uniform is not None
    assert result.kl_heldout == result.uniform.kl_heldout


def test_options_of_a_solver_of_ones_own_are_checked_before_anything_runs(module: str) -> None:
    own = (f"imports=[{module}]", "search=own")
    with pytest.raises(ConfigError, match=r"search\.solver: must be one of .*'dearestt'; did you mean 'dearest'"):
        config(*own, "search.solver=dearestt")
    with pytest.raises(ConfigError, match=r"search: solver 'dearest' has no option 'num_trie'; did you mean 'num_tri"):
        config(*own, "search.solver=dearest", "+search.num_trie=5")
    with pytest.raises(ConfigError, match=r"no option 'num_proposals'.*brings no options of other solvers"):
        config(own[0], "search.solver=dearest")


@pytest.mark.slow
def test_a_worker_of_a_study_imports_too(module: str, tmp_path: Path) -> None:
    """Spawned as ``study.workers=2`` does, it knows nothing of what its parent has imported."""
    places = (f"study.folder={tmp_path / 'out'}", f"cache_dir={tmp_path / 'cache'}", "num_threads=1")
    options = (
        "study.options.names=[feature_norm]",
        "study.options.space=dop",
        "study.options.num_candidates=1",
        "data.num_test=0",
        "budget=0.3",
    )
    chosen = config("experiment=selectors", *TINY[2:-3], *options, *places, f"imports={module}", "tracking=none")
    assert chosen.imports == (module,)
    process = multiprocessing.get_context("spawn").Process(target=study_run._work, args=(chosen,))
    process.start()
    process.join()
    assert process.exitcode == 0
    rows = read_result(tmp_path / "out" / "result.json")["rows"]
    assert {row["selector"] for row in rows} == {"feature_norm"}


@pytest.mark.parametrize(
    "run",
    [
        lambda: exit_status(search, "dop-search", "imports=[my_missing]", "tracking=none"),
        lambda: exit_status(search, "dop-search", "experiment=claims", "imports=[my_missing]", "tracking=none"),
        lambda: exit_status(evaluate, "dop-eval", "imports=my_missing", "tracking=none"),
        lambda: bench(["--imports", "my_missing"]),
    ],
    ids=["dop-search", "study", "dop-eval", "dop-bench"],
)
def test_a_module_that_is_not_there_is_named_with_the_remedy(
    run: Callable[[], int], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run() == 1
    message = capsys.readouterr().err
    assert "`imports` names 'my_missing', which cannot be imported" in message
    assert "PYTHONPATH=FOLDER" in message


def test_a_file_is_not_a_module_name() -> None:
    with pytest.raises(ConfigError, match=r"imports\[1\]: .*my_package\.selectors, not '\./mine\.py'"):
        config("imports=[os.path,./mine.py]")

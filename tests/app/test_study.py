"""A study from outside, found or refused by name, and published rows that a new folder begins with."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from support.command_line import exit_status
from support.small_studies import PUBLISHED, study_config

from dop_search.app import study as studies
from dop_search.app.cli.search import main
from dop_search.app.config import parse_config
from dop_search.app.study import STUDIES, Study, find_study, study_names
from dop_search.app.study_run import run_study
from dop_search.utils.conf import CONFIG_NAME, config_dir
from dop_search.utils.errors import ConfigError
from dop_search.utils.progress import Progress

MODULE = """
from dop_search.app.study import STUDIES, Study


class Lengths(Study):
    question = "How long are the questions?"

    factor: int = 1
    \"\"\"Multiplies them.\"\"\"

    def keys(self, bench):
        return [{"split": split} for split in ("search", "heldout")]

    def row(self, bench, split):
        return {"characters": self.factor * sum(len(sample.question) for sample in bench.data(split))}


STUDIES["lengths"] = Lengths
"""
EXPERIMENT = """# @package _global_
study: {name: lengths, folder: null, published: null, workers: 1, options: {factor: 1}}
tracking: {backend: none}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with a study and its experiment file, in a folder of the user's; nothing of it stays."""
    before = dict(STUDIES)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "lengths.yaml").write_text(EXPERIMENT)
    (tmp_path / "my_studies.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "my_studies"
    sys.modules.pop("my_studies", None)
    STUDIES.clear()
    STUDIES.update(before)


def test_a_study_of_ones_own_runs_by_the_command(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("data.num_samples=2", "data.num_heldout=3", "cache_dir=cache")
    given = ("--config-dir", "conf", f"imports={module}", "experiment=lengths", *few)
    assert exit_status(main, "dop-search", *given) == 0
    rows = json.loads((tmp_path / "outputs" / "lengths" / "result.json").read_text())["rows"]
    assert [row["split"] for row in rows] == ["search", "heldout"]
    assert exit_status(main, "dop-search", *given, "study.options.factor=2", "study.folder=twice") == 0
    twice = json.loads((tmp_path / "twice" / "result.json").read_text())["rows"]
    assert [row["characters"] for row in twice] == [2 * row["characters"] for row in rows]
    capsys.readouterr()
    assert exit_status(main, "dop-search", *given, "study.options.factor=many") == 1
    assert "study.options.factor: input should be a valid integer, but got 'many'" in capsys.readouterr().err


def test_a_name_that_is_taken_is_refused(module: str) -> None:
    find_study("claims")
    with pytest.raises(ConfigError, match=r"there is a study 'claims' \(experiments\.claims\.study\.Claims\)"):
        STUDIES["claims"] = find_study("compare")


def test_a_misspelt_study_gets_a_near_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown study 'comparee'; did you mean 'compare'.*there are additive_vs"):
        run_study(study_config("compare", tmp_path, "study.name=comparee"), Progress())


def test_an_installed_package_without_experiments_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(config_dir(), tmp_path / "dop_search" / "conf")
    monkeypatch.setattr(studies, "config_dir", lambda: tmp_path / "dop_search" / "conf")
    monkeypatch.setattr(studies, "STUDIES", type(STUDIES)("study", {}))
    assert study_names() == []
    with pytest.raises(ConfigError, match=r"studies lie in experiments/ of a checkout.*clone the repository"):
        find_study("compare")


def test_a_file_with_two_studies_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "experiments" / "doubled_study"
    folder.mkdir(parents=True)
    class_ = MODULE.partition("STUDIES[")[0]
    (folder / "study.py").write_text(class_ + class_.replace("Lengths", "Widths"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(studies, "config_dir", lambda: tmp_path / "conf")
    with pytest.raises(ConfigError, match="must define one study, but it has 2"):
        find_study("doubled_study")
    sys.modules.pop("experiments.doubled_study.study", None)


def committed(experiment: str, *overrides: str) -> tuple[Path, list[str]]:
    """The folder of the committed result, and the overrides that the tests run it with."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        study = parse_config(compose(CONFIG_NAME, [f"experiment={experiment}"])).study
    assert study is not None
    assert study.published is not None
    given = [f"experiment={experiment}", "++study.workers=1", "tracking=none", "num_threads=1", *overrides]
    return config_dir().parent / study.published, given


def run_composed(overrides: list[str]) -> Path:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = parse_config(compose(CONFIG_NAME, overrides))
    return run_study(config, Progress()).folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some studies need the full model's answers even where they measure nothing: those are the same."""
    return tmp_path_factory.mktemp("cache")


def check_that_nothing_changes(experiment: str, place: Path, cache: Path) -> None:
    folder, given = committed(experiment, f"cache_dir={cache}", f"study.folder={place}")
    run_composed(given)
    for path in folder.iterdir():
        if path.suffix in (".json", ".png"):
            assert (place / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.drawn
@pytest.mark.parametrize("experiment", PUBLISHED)
def test_a_committed_study_measures_and_changes_nothing(experiment: str, tmp_path: Path, cache: Path) -> None:
    """In a new folder, which begins with it."""
    check_that_nothing_changes(experiment, tmp_path / "new", cache)


@pytest.mark.slow
@pytest.mark.drawn
def test_a_study_that_is_done_changes_nothing_in_its_own_folder(tmp_path: Path, cache: Path) -> None:
    shutil.copytree(committed("solver")[0], tmp_path / "copy")
    check_that_nothing_changes("solver", tmp_path / "copy", cache)


def test_rows_of_another_setup_are_not_taken(tmp_path: Path) -> None:
    folder, given = committed("claims", f"cache_dir={tmp_path / 'cache'}", f"study.folder={tmp_path / 'new'}")
    other = tmp_path / "published"
    other.mkdir()
    for row in "ab":
        data = json.loads((folder / "result.json").read_text())
        data["rows"].append({"claim": row, "claimed": "", "measured": ""})
        data["setup"]["samples"]["test"] = {"a": 204, "b": 5}[row]
        (other / "result.json").write_text(json.dumps(data))
        run_composed([*given, f"study.published={other}", f"study.folder={tmp_path / row}"])
    claims = [json.loads((tmp_path / row / "result.json").read_text())["rows"][-1]["claim"] for row in "ab"]
    assert claims == ["a", "benchmarks"]


def test_a_study_needs_rows() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Study()  # type: ignore[abstract]

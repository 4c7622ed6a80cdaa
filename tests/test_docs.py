"""What the Markdown says is true: its Python runs, its links lead somewhere, its commands compose."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from dop_search.app.config import parse_as
from dop_search.app.config.schema import EvalRunConfig, SearchConfig
from dop_search.app.study import STUDIES, find_study, study_names
from dop_search.app.study_run import run_study
from dop_search.search import SOLVERS, Problem, Solution, additive_exact, solve
from dop_search.selectors import SELECTORS
from dop_search.strategy.cost import Budget
from dop_search.utils.conf import CONFIG_NAME, config_dir
from dop_search.utils.progress import Progress

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "conf/*.md", "dop_search/**/*.md", "experiments/**/*.md")
    for path in ROOT.glob(pattern)
)
RUNNABLE = [
    pytest.param("dop_search/README.md", marks=pytest.mark.slow),
    *(f"dop_search/{folder}/README.md" for folder in ("selectors", "search", "pruning", "baselines", "evaluation")),
    "experiments/README.md",
]


def blocks(document: str | Path, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def registries_kept():
    before = [(registry, dict(registry)) for registry in (SELECTORS, SOLVERS, STUDIES)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("document", RUNNABLE)
@pytest.mark.fast_cases(2)
def test_examples_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries_kept: None) -> None:
    """All Python of a document in one namespace, top to bottom."""
    monkeypatch.chdir(tmp_path)
    code = blocks(document, "python")
    assert code
    exec(compile("\n".join(code), document, "exec", dont_inherit=True), {"__name__": "readme"})


def test_the_sample_solver_runs_as_the_pipeline_calls_it(registries_kept: None) -> None:
    """With the options of a section and ``on_progress``, which is not passed to a solver without it."""
    sample: dict[str, Any] = {"__name__": "readme"}
    exec("\n".join(blocks("dop_search/search/README.md", "python")), sample)

    def silent(problem: Problem, budget: Budget, seed: int = 0) -> Solution:
        return additive_exact(problem, budget)

    SOLVERS["silent"] = silent
    heard: list[tuple[int, int, str]] = []
    for name in ("random_search", "silent"):
        found = solve(name, sample["problem"], sample["budget"], seed=1, on_progress=lambda *step: heard.append(step))
        assert found.cost_ratio <= 0.5
    assert heard[0] == (0, 500, "random assignments")


def test_the_sample_suite_is_a_suite(tmp_path: Path) -> None:
    """As a file in a folder given by ``--config-dir``."""
    (text,) = blocks("dop_search/evaluation/README.md", "yaml")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "mine.yaml").write_text(text, encoding="utf-8")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        overrides = ["eval=mine", f"hydra.searchpath=[file://{tmp_path}]"]
        config = parse_as(compose("eval_config", overrides=overrides), EvalRunConfig)
    suite = config.eval
    assert suite is not None
    assert [benchmark.name for benchmark in suite.benchmarks] == ["gqa", "infovqa"]
    sample: dict[str, Any] = {"__name__": "readme"}
    exec("\n".join(blocks("dop_search/evaluation/README.md", "python")), sample)
    assert suite.benchmarks == sample["suite"].benchmarks


def test_lines_of_markdown_fit_a_screen() -> None:
    """Tables cannot be broken, all else has at most 120 characters."""
    too_long = [
        f"{document}:{number}"
        for document in DOCUMENTS
        for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not line.lstrip().startswith("|")
    ]
    assert not too_long


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("http") or (ROOT / document.parent / link).exists(), f"{document}: {link}"


def commands() -> list[str]:
    """Every `dop-search` and `dop-eval` line of the documents' shell blocks."""
    lines = [
        line.partition("  #")[0]
        for path in DOCUMENTS
        for block in blocks(path, "bash")
        for line in block.replace("\\\n", " ").split("\n")
    ]
    found = [re.sub(r"^([A-Z_]+=\S+ )*(uv run (--\S+ \S+ )*)?", "", line.strip()) for line in lines]
    return sorted({line for line in found if line.startswith(("dop-search ", "dop-eval ")) and "--" not in line})


@pytest.fixture
def module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registries_kept: None) -> Iterator[str]:
    """``mine``: the Python of the document with the command, as ``imports=mine`` finds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine"
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("command", commands())
@pytest.mark.fast_cases(4)
def test_commands_compose_and_validate(command: str, tmp_path: Path, module_of_ones_own: str) -> None:
    """Sweeps are tried at the first value of each key."""
    name, *words = shlex.split(command)
    if any(word.startswith("imports=") for word in words):
        words = [re.sub("^imports=.*", f"imports={module_of_ones_own}", word) for word in words]
        (document,) = (path for path in DOCUMENTS if command in (ROOT / path).read_text(encoding="utf-8"))
        (tmp_path / "mine.py").write_text("\n".join(blocks(document, "python")), encoding="utf-8")
    if "-m" in words:
        words = [re.sub(r"=([^\[{,]+),.*", r"=\1", word) for word in words if word != "-m"]
    config_name, schema = (CONFIG_NAME, SearchConfig) if name == "dop-search" else ("eval_config", EvalRunConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = parse_as(compose(config_name, overrides=words), schema)
    if (
        isinstance(config, SearchConfig)
        and config.study is not None
        and not config.model.name_or_path.startswith("pocket")
    ):
        assert config.study.workers == 1, "every worker loads a copy of the model"


def test_every_study_is_listed_with_its_question() -> None:
    text = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    for name in study_names():
        assert f"- [{name}]({name}/README.md):\n  {find_study(name).question}\n" in text


@pytest.mark.slow
def test_the_sample_study_runs(tmp_path: Path, registries_kept: None) -> None:
    code = "\n".join(blocks("experiments/README.md", "python"))
    exec(compile(code, "<readme>", "exec", dont_inherit=True), {"__name__": "readme"})
    few = ("data.num_samples=2", "data.num_heldout=3", "tracking=none", f"cache_dir={tmp_path / 'cache'}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        study = f"study={{name: few_tokens, folder: {tmp_path / 'out'}, options: {{counts: [8, 200]}}}}"
        config = parse_as(compose(CONFIG_NAME, overrides=[*few, study]), SearchConfig)
    result = run_study(config, Progress()).data
    few_, many = result["rows"]
    assert few_["kl_heldout"] == result["summary"]["largest"] > many["kl_heldout"]
    assert (tmp_path / "out" / "few_tokens.png").exists()

"""What many tests share: the bundled model and a few of its samples, loaded once; and which tests are slow."""

import gc
import os
import sys
from collections import Counter

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and so do the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling what is imported takes longer than most tests,
sys.dont_write_bytecode = False  # here and in each process that a test starts

gc.disable()  # until everything is imported: a million objects that stay

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


SLOW_FIXTURES = {"logged", "run_small_study", "searched"}
"""A test that uses one of these is slow; others say so by ``pytest.mark.slow``."""

FAST_FAMILIES = {"llava", "qwen2_5_vl"}
"""What is tested on every family is tested on these in the fast lane, and slow on the others."""


def pytest_addoption(parser):
    parser.addoption("--sweeps", type=int, default=1, help="how often each engine runs a first sweep (then of 4 runs)")


def pytest_terminal_summary(terminalreporter):
    """Which services were there: tests that need one are skipped without it."""
    found = {}
    kinds = ("passed", "failed", "error", "skipped")
    for report in (report for kind in kinds for report in terminalreporter.stats.get(kind, ())):
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.outcome == "skipped" else None
        for name, value in getattr(report, "user_properties", ()):
            if name == "service":
                found[value] = f"{value} ran" if reason is None else f"{value} not run ({reason})"
    if found:
        terminalreporter.write_line(f"services: {', '.join(found[name] for name in sorted(found))}")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # libraries count at the end what was not freed


def is_slow(item, families, num_cases):
    values = [*item.callspec.params.values()] if hasattr(item, "callspec") else []
    named = {value for value in [*values, getattr(item.cls, "model_type", None)] if isinstance(value, str)} & families
    fast_cases = item.get_closest_marker("fast_cases")
    return (
        (named and not named & FAST_FAMILIES)
        or not SLOW_FIXTURES.isdisjoint(item.fixturenames)
        or (fast_cases and num_cases > fast_cases.args[0])
    )


def pytest_collection_modifyitems(items):
    """Marks slow tests; files of many slow ones come first, so that no core waits for the other's last file."""
    from dop_search.models import FAMILIES

    families = set(FAMILIES)
    cases = Counter()
    for item in items:
        item.user_properties += [("service", mark.args[0]) for mark in item.iter_markers("service")]
        cases[item.parent, item.originalname] += 1
        if is_slow(item, families, cases[item.parent, item.originalname]):
            item.add_marker(pytest.mark.slow)
    tests = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path] / tests[item.path])


@pytest.fixture(scope="session")
def pocket():
    from dop_search.models.loading import load

    return load("pocket")


@pytest.fixture(scope="session")
def few_samples():
    """Six rendered samples, one per question family."""
    from dop_search.data.validation import validation_set

    return validation_set("pocket", num_samples=6, seed=7)


@pytest.fixture(scope="session")
def teacher(pocket, few_samples):
    from dop_search.divergence import make_teacher
    from dop_search.selectors import make_selector

    return make_teacher(pocket, few_samples, make_selector("cls_attention"), max_new_tokens=6, batch_size=4)


@pytest.fixture
def run_small_study(tmp_path):
    """``run_small_study(name, *overrides)``: the content of ``tmp_path/out/result.json``."""
    from support.small_studies import study_config

    from dop_search.app.study_run import run_study
    from dop_search.utils.progress import Progress

    def run(name, *overrides):
        return run_study(study_config(name, tmp_path, *overrides), Progress()).data

    return run

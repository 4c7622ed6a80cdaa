"""Extras that are missing or of another version: one sentence says which, and how to install them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest

from dop_search.utils import extras
from dop_search.utils.errors import MissingExtraError


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions to pretend; ``None``: not installed."""
    pretended: dict[str, str | None] = {}

    def pretend(name: str) -> str:
        found = pretended.get(name, version(name))
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(extras, "version", pretend)
    return pretended


def sentence(*names: str) -> str:
    with pytest.raises(MissingExtraError) as caught:
        extras.check_extras("this", *names)
    return str(caught.value)


def test_what_is_installed_is_no_error() -> None:
    extras.check_extras("this", "search", "eval", "slurm", "ray", "postgres", "testing")


def test_a_version_that_the_extra_does_not_allow_is_named(changed: dict[str, str | None]) -> None:
    changed["filelock"] = "4.3.1"  # without the private module that lmms-eval imports
    assert "`dop-search[eval]` (filelock is 4.3.1, not <4.3)" in sentence("eval")
    extras.check_extras("this", "search")


def test_missing_packages_are_counted_after_three(changed: dict[str, str | None]) -> None:
    changed |= dict.fromkeys(["optuna"], None)
    assert "this needs `dop-search[search]` (not installed: optuna); install with: " in sentence("search")
    changed |= dict.fromkeys(["cmaes", "rich", "scipy", "lmms-eval"], None)
    found = sentence("search", "eval")
    assert found.startswith("this needs `dop-search[search]` and `dop-search[eval]` (not installed: ")
    assert " and 2 more); install with: pip install 'dop-search[search,eval]', in a clone: uv sync " in found
    assert found.endswith(" --extra search --extra eval")


def test_without_metadata_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "DISTRIBUTION", "not-installed")
    extras.check_extras("this", "search")

"""The pins of pyproject.toml: they are what is installed here, and pip's file says the same."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = PYPROJECT["tool"]["uv"]["constraint-dependencies"]


def group(name: str) -> list[Requirement]:
    """The requirements of a dependency group, with those of the groups that it includes."""
    found: list[Requirement] = []
    for item in PYPROJECT["dependency-groups"][name]:
        found += [Requirement(item)] if isinstance(item, str) else group(item["include-group"])
    return found


def needed(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Every package that the requirements bring, by the metadata of what is installed, with one that asks for it."""
    asked_by: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, "pyproject.toml") for requirement in requirements]
    while waiting:
        requirement, parent = waiting.pop()
        name = canonicalize_name(requirement.name)
        asked_by.setdefault(name, parent)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            for child in map(Requirement, _requires(name)):
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    waiting.append((child, name))
    return asked_by


def differences(pins: Iterable[str], requirements: Iterable[Requirement]) -> list[str]:
    """One line for each package that is missing, has another version than its pin, or has no pin."""
    parsed = map(Requirement, pins)
    pinned = {
        canonicalize_name(pin.name): pin.specifier for pin in parsed if pin.marker is None or pin.marker.evaluate()
    }
    asked_by = needed(requirements)
    lines = []
    for name in sorted({*asked_by, *pinned} - {canonicalize_name(PYPROJECT["project"]["name"])}):
        version = _version(name)
        if version is None and name in asked_by:
            lines.append(f"{name} is not installed, but {asked_by[name]} needs it")
        elif version is not None and name not in pinned:
            lines.append(f"{name} {version} is not pinned, but {asked_by[name]} needs it")
        elif version is not None and version not in pinned[name]:
            lines.append(f"{name} {version} is installed, but {pinned[name]} is pinned")
    return lines


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _requires(name: str) -> list[str]:
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []


def test_what_is_installed_is_what_is_pinned() -> None:
    found = differences(PINS, group("test"))
    assert not found, "\n".join(
        [*found, "`uv sync --group test` installs the pins; `python .ci/pins.py` pins what a changed dependency brings"]
    )


@pytest.mark.parametrize("name", ["torch", "filelock", "ruff"])
@pytest.mark.fast_cases(1)
def test_a_pin_changed_by_hand_is_named(name: str) -> None:
    installed = distribution(name).version
    changed = [pin.replace(f"=={installed}", "==0.0.1") if pin.startswith(f"{name}==") else pin for pin in PINS]
    assert differences(changed, group("test")) == [f"{name} {installed} is installed, but ==0.0.1 is pinned"]


def test_a_package_without_a_pin_and_one_that_is_missing_are_named() -> None:
    without = [pin for pin in PINS if not pin.startswith("filelock==")]
    missing, unpinned = differences(without, [*group("test"), Requirement("not-there>=1")])[::-1]
    assert missing == "not-there is not installed, but pyproject.toml needs it"
    assert unpinned.startswith(f"filelock {distribution('filelock').version} is not pinned, but ")


def test_pip_and_the_builds_get_the_same_pins_as_uv() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == PINS
    assert set(PYPROJECT["tool"]["uv"]["build-constraint-dependencies"]) <= set(PINS)


def test_pins_are_names_and_versions() -> None:
    for pin in map(Requirement, PINS):
        assert pin.url is None
        assert [specifier.operator for specifier in pin.specifier] == ["=="]
        assert "*" not in str(pin.specifier)

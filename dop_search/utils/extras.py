"""The extras of the package: said in one sentence, before anything that needs one is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from dop_search.utils.errors import MissingExtraError

DISTRIBUTION = "dop-search"


def check_extras(what: str, *extras: str) -> None:
    """Check that the packages of extras are installed, in versions that they allow.

    Args:
        what: what needs them, for the message.
        extras: names of ``[project.optional-dependencies]``; all are named if one is incomplete.

    Raises:
        MissingExtraError: says which packages are not there, and how to install the extras.
    """
    problems = [problem for extra in extras for problem in _problems(extra)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise MissingExtraError(
            f"{what} needs {' and '.join(f'`{DISTRIBUTION}[{extra}]`' for extra in extras)} "
            f"({', '.join(problems[:3])}{more}); install with: pip install '{DISTRIBUTION}[{','.join(extras)}]', "
            f"in a clone: uv sync --inexact {' '.join(f'--extra {extra}' for extra in extras)}"
        )


def _problems(extra: str) -> list[str]:
    """A phrase per package that is missing or has another version than the extra allows."""
    try:
        listed = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # on PYTHONPATH, not installed: nothing says what the extra holds
        return []
    found = []
    for requirement in map(Requirement, listed):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            continue  # of every installation
        if not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} is {installed}, not {requirement.specifier}")
    return found

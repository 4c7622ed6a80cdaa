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
    missing, unfit = [], []
    for requirement in _requirements(extras):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            unfit.append(f"{requirement.name} is {installed}, not {requirement.specifier}")
    if missing or unfit:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        problems = [f"not installed: {', '.join(missing[:3])}{more}"] if missing else []
        raise MissingExtraError(
            f"{what} needs {' and '.join(f'`{DISTRIBUTION}[{extra}]`' for extra in extras)} "
            f"({'; '.join(problems + unfit)}); install with: pip install '{DISTRIBUTION}[{','.join(extras)}]', "
            f"in a clone: uv sync --inexact {' '.join(f'--extra {extra}' for extra in extras)}"
        )


def _requirements(extras: tuple[str, ...]) -> list[Requirement]:
    """What the extras add to every installation; nothing where the package is on a path and not installed."""
    try:
        listed = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return []
    optional = [(item, item.marker) for item in listed if item.marker and not item.marker.evaluate({"extra": ""})]
    return [item for item, marker in optional if any(marker.evaluate({"extra": extra}) for extra in extras)]

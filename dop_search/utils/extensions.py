"""Code of one's own beside this package: modules that register a selector, a model family or a method at import."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from dop_search.utils.errors import ConfigError


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, in order, before anything is looked up by name; one that is imported is not run again.

    Raises:
        ConfigError: naming a module that cannot be imported, and what to do.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"`imports` names {name!r}, which cannot be imported: {error}; install it into this environment, "
                "or put its folder on the path: PYTHONPATH=FOLDER"
            ) from error

"""Things by name: selectors, methods, model families, solvers, studies; and near names for whatever is misspelt."""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

from dop_search.utils.errors import ConfigError, DopError

T = TypeVar("T")


class Registry(UserDict[str, T]):
    """Entries by name; a module of one's own adds to it, ``REGISTRY["mine"] = Mine``.

    Args:
        what: an entry is, as users call it.
        entries: to begin with.
        error: raised on an unknown name.
    """

    def __init__(self, what: str, entries: Mapping[str, T], error: type[DopError] = ConfigError) -> None:
        self.what, self._error = what, error
        super().__init__(entries)

    def find(self, name: str) -> T:
        """The entry of that name; a DopError of the registry's kind, with a near name and all that there are."""
        if name not in self:
            raise self._error(unknown(self.what, name, self))
        return self[name]

    def __setitem__(self, name: str, entry: T) -> None:
        """Add an entry, ConfigError if its name is taken; what a notebook's cell defined may be defined again."""
        known = self.get(name, entry)
        if known != entry and _origin(known) != _origin(entry):
            raise ConfigError(f"there is a {self.what} {name!r} ({_origin(known)}); give yours another name")
        super().__setitem__(name, entry)


def import_modules(names: Sequence[str]) -> None:
    """Import modules of one's own, in order, before anything is looked up by name; what they register can be chosen.

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


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message on a name that selects nothing."""
    names = list(known)
    return f"unknown {what} {name!r}; {did_you_mean(name, names)}there are {', '.join(names) or 'none'}"


def did_you_mean(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """``did you mean 'a'? `` with up to ``count`` near names, to be followed by more; empty if none is near."""
    near = get_close_matches(name, list(known), n=count, cutoff=cutoff)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def _origin(entry: object) -> str:
    """Where an entry was defined; of a text, the text."""
    kind = entry if hasattr(entry, "__qualname__") else type(entry)
    return entry if isinstance(entry, str) else f"{kind.__module__}.{kind.__qualname__}"

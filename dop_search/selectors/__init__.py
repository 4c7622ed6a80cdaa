"""Selection criteria: which visual tokens come first."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from dop_search.errors import DopError
from dop_search.selectors.base import Selector, SelectorInputs
from dop_search.selectors.cls_attention import ClsAttentionSelector
from dop_search.selectors.random_order import RandomSelector
from dop_search.selectors.received_attention import ReceivedAttentionSelector
from dop_search.selectors.uniform_grid import UniformGridSelector

SELECTORS: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (ClsAttentionSelector, RandomSelector, ReceivedAttentionSelector, UniformGridSelector)
}


def make_selector(name: str, options: Mapping[str, Any] | None = None) -> Selector:
    """The selector of that name.

    Raises:
        DopError: on an unknown name or option, with near names.
    """
    if name not in SELECTORS:
        near = difflib.get_close_matches(name, SELECTORS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DopError(f"unknown selector {name!r}; there are {', '.join(sorted(SELECTORS))}.{hint}")
    known = SELECTORS[name].option_names()
    unknown = [option for option in options or {} if option not in known]
    if unknown:
        raise DopError(f"selector {name!r} has no option {unknown}; it has {list(known)}")
    return SELECTORS[name](**(options or {}))


__all__ = ["SELECTORS", "Selector", "SelectorInputs", "make_selector"]

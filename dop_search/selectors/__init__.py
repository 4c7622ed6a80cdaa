"""Selection criteria: which visual tokens come first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from dop_search.selectors.attention_choice import ClsAttentionSelector, ReceivedAttentionSelector
from dop_search.selectors.base import Selection, SelectionSizes, Selector, SelectorInputs
from dop_search.selectors.cdpruner import CdprunerLlmSelector, CdprunerSelector
from dop_search.selectors.controls import AvgPoolSelector, RandomSelector, UniformGridSelector
from dop_search.selectors.divprune import DivPruneSelector, LazyDivPruneSelector
from dop_search.selectors.flowcut import FlowCutSelector
from dop_search.selectors.gprune import GPruneSelector
from dop_search.selectors.hiprune import HiPruneSelector
from dop_search.selectors.hired import HiredSelector
from dop_search.selectors.holov import HoloVSelector
from dop_search.selectors.prumerge import PruMergePlusSelector
from dop_search.selectors.prunesid import PruneSidSelector
from dop_search.selectors.resize import ResizeSelector
from dop_search.selectors.scope import ScopeSelector
from dop_search.selectors.tome import ToMeSelector
from dop_search.selectors.trim import TrimLlmSelector, TrimSelector
from dop_search.selectors.visionzip import VisionZipSelector
from dop_search.selectors.vispruner import VisPrunerSelector
from dop_search.selectors.vscan import VScanSelector
from dop_search.utils.errors import DopError
from dop_search.utils.registry import Registry

_SELECTORS: tuple[type[Selector], ...] = (
    AvgPoolSelector,
    CdprunerLlmSelector,
    CdprunerSelector,
    ClsAttentionSelector,
    DivPruneSelector,
    LazyDivPruneSelector,
    FlowCutSelector,
    GPruneSelector,
    HiPruneSelector,
    HiredSelector,
    HoloVSelector,
    PruMergePlusSelector,
    PruneSidSelector,
    RandomSelector,
    ReceivedAttentionSelector,
    ResizeSelector,
    ScopeSelector,
    ToMeSelector,
    TrimLlmSelector,
    TrimSelector,
    UniformGridSelector,
    VisPrunerSelector,
    VisionZipSelector,
    VScanSelector,
)
SELECTORS = Registry("selector", {selector.name: selector for selector in _SELECTORS}, DopError)
"""By name; a module of one's own adds to it, ``SELECTORS["mine"] = Mine``."""


def make_selector(name: str, options: Mapping[str, Any] | None = None) -> Selector:
    """The selector of that name; DopError on an unknown name or option, with near names, or an option of another
    type."""
    selector = SELECTORS.find(name)
    known = selector.option_names()
    unknown = [option for option in options or {} if option not in known]
    if unknown:
        raise DopError(f"selector {name!r} has no option {unknown}; it has {list(known)}")
    hints = get_type_hints(selector)
    for option, value in (options or {}).items():
        kinds = get_args(hints[option]) or (hints[option],)
        if set(kinds) <= _PLAIN and not any(_is(value, kind) for kind in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise DopError(f"option `{option}` of selector {name!r} must be {expected}, but got {value!r}")
    return selector(**(options or {}))


_PLAIN = frozenset({bool, int, float, str, type(None)})


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; an integer is a float too, and ``True`` is no number."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


__all__ = ["SELECTORS", "Selection", "SelectionSizes", "Selector", "SelectorInputs", "make_selector"]

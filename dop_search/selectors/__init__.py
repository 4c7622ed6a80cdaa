"""Selection criteria: which visual tokens come first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dop_search.selectors.avg_pool import AvgPoolSelector
from dop_search.selectors.base import Selection, SelectionSizes, Selector, SelectorInputs
from dop_search.selectors.cdpruner import CdprunerLlmSelector, CdprunerSelector
from dop_search.selectors.cls_attention import ClsAttentionSelector
from dop_search.selectors.divprune import DivPruneSelector, LazyDivPruneSelector
from dop_search.selectors.hiprune import HiPruneSelector
from dop_search.selectors.hired import HiredSelector
from dop_search.selectors.holov import HoloVSelector
from dop_search.selectors.prumerge import PruMergePlusSelector
from dop_search.selectors.random_order import RandomSelector
from dop_search.selectors.received_attention import ReceivedAttentionSelector
from dop_search.selectors.resize import ResizeSelector
from dop_search.selectors.scope import ScopeSelector
from dop_search.selectors.tome import ToMeSelector
from dop_search.selectors.trim import TrimLlmSelector, TrimSelector
from dop_search.selectors.uniform_grid import UniformGridSelector
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
    HiPruneSelector,
    HiredSelector,
    HoloVSelector,
    PruMergePlusSelector,
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
    """The selector of that name.

    Raises:
        DopError: on an unknown name or option, with near names.
    """
    selector = SELECTORS.find(name)
    known = selector.option_names()
    unknown = [option for option in options or {} if option not in known]
    if unknown:
        raise DopError(f"selector {name!r} has no option {unknown}; it has {list(known)}")
    return selector(**(options or {}))


__all__ = ["SELECTORS", "Selection", "SelectionSizes", "Selector", "SelectorInputs", "make_selector"]

"""Selection criteria: which visual tokens come first."""

from __future__ import annotations

import difflib
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

SELECTORS: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (
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


__all__ = ["SELECTORS", "Selection", "SelectionSizes", "Selector", "SelectorInputs", "make_selector"]

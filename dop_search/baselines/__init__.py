"""Published methods, each solved for the same FLOPs before anything is compared."""

from __future__ import annotations

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.dart import Dart
from dop_search.baselines.evaluate import Outcome, plain_answers, plain_divergence, plain_outcome
from dop_search.baselines.fastv import FastV
from dop_search.baselines.fitprune import FitPrune
from dop_search.baselines.gsop import Gsop
from dop_search.baselines.hidrop import HiDrop
from dop_search.baselines.ivc_prune import IvcPrune
from dop_search.baselines.pyramiddrop import PyramidDrop
from dop_search.baselines.resize import InputResize
from dop_search.baselines.short_lvlm import ShortLvlm
from dop_search.baselines.shortv import ShortV
from dop_search.baselines.skip_vision import SkipVision
from dop_search.baselines.sparsevlm import SparseVlm
from dop_search.baselines.uniform import UniformReduction
from dop_search.baselines.vtw import Vtw
from dop_search.selectors import SELECTORS
from dop_search.utils.registry import Registry

_PUBLISHED: tuple[Method, ...] = (
    InputResize(),
    FastV(),
    PyramidDrop(),
    SparseVlm(),
    SparseVlm("sparsevlm_v2"),
    Dart(),
    FitPrune(),
    IvcPrune(),
    HiDrop(),
    Vtw(),
    ShortV(),
    Gsop(),
    SkipVision(),
    ShortLvlm(),
    ShortLvlm("short_lvlm_repair", repair_rank=16),
)
BASELINES: Registry[Method] = Registry(
    "baseline",
    {**{name: UniformReduction(name) for name in SELECTORS}, **{method.name: method for method in _PUBLISHED}},
)
"""Every method by name; a selector's name is uniform reduction by that selector. A module of one's own adds to it."""


def baseline(name: str) -> Method:
    """The method of that name; uniform reduction for a selector that was registered since.

    Raises:
        ConfigError: if there is none; names a near one.
    """
    if name not in BASELINES and name in SELECTORS:
        return UniformReduction(name)
    return BASELINES.find(name)


__all__ = [
    "BASELINES",
    "FitContext",
    "FittedMethod",
    "Method",
    "Outcome",
    "baseline",
    "plain_answers",
    "plain_divergence",
    "plain_outcome",
]

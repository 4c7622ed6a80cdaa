"""Published methods, each solved for the same FLOPs before anything is compared."""

from __future__ import annotations

from collections.abc import Mapping

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.evaluate import Outcome, plain_answers, plain_divergence, plain_outcome
from dop_search.baselines.fitprune import FitPrune
from dop_search.baselines.gsop import Gsop
from dop_search.baselines.hidrop import HiDrop
from dop_search.baselines.one_stage import Dart, EntropyPrune, FastV, IvcPrune
from dop_search.baselines.pyramiddrop import PyramidDrop
from dop_search.baselines.resize import InputResize
from dop_search.baselines.short_lvlm import ShortLvlm
from dop_search.baselines.shortv import ShortV
from dop_search.baselines.skip_vision import SkipVision
from dop_search.baselines.space_search import SEARCHED_SELECTORS, SEARCHED_SPACES, SPACES, SpaceSearch, UniformSearch
from dop_search.baselines.sparsevlm import SparseVlm
from dop_search.baselines.two_stage import FlowCut, VScan
from dop_search.baselines.uniform import Full, Uniform, UniformReduction
from dop_search.baselines.vtw import Vtw
from dop_search.selectors import SELECTORS
from dop_search.utils.errors import ConfigError
from dop_search.utils.registry import Registry, unknown

_PUBLISHED: tuple[Method, ...] = (
    InputResize(),
    FastV(),
    EntropyPrune(),
    PyramidDrop(),
    SparseVlm(),
    SparseVlm("sparsevlm_v2"),
    SparseVlm("adaptinfer"),
    Dart(),
    FitPrune(),
    IvcPrune(),
    HiDrop(),
    VScan(),
    FlowCut(),
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


_OWN: tuple[Method, ...] = (
    Full(),
    Uniform(),
    UniformSearch(),
    *(SpaceSearch(space, (space,)) for space in SPACES),
    SpaceSearch("dop_search", SEARCHED_SPACES, SEARCHED_SELECTORS, num_proposals=24),
)
OWN: Mapping[str, Method] = {item.name: item for item in _OWN}
"""What published methods are compared with: the full model, uniform reduction by the chosen or the best selector, the
best of a space, and of spaces and selectors together."""


def baseline(name: str) -> Method:
    """The method of that name; uniform reduction for a selector that was registered since. ConfigError if there is
    none; names a near one."""
    if name in OWN:
        return OWN[name]
    if name not in BASELINES and name in SELECTORS:
        return UniformReduction(name)
    if name not in BASELINES:
        raise ConfigError(unknown("method", name, [*OWN, *BASELINES]))
    return BASELINES[name]


def parse_method(name: str) -> tuple[Method, str | None]:
    """``METHOD`` or ``METHOD@SELECTOR``: the method, and the selector if there is one; ConfigError if there is no such
    method or selector, or the method ranks by no selector of one's choice."""
    before, _, selector = name.partition("@")
    method = baseline(before)
    if not selector:
        return method, None
    if not method.uses_selector:
        raise ConfigError(f"{before!r} has no selector to choose, but got {name!r}; leave out @{selector}")
    SELECTORS.find(selector)
    return method, selector


def known_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names as they are; ConfigError if one is no ``METHOD`` or ``METHOD@SELECTOR``."""
    for name in names:
        parse_method(name)
    return names


__all__ = [
    "BASELINES",
    "OWN",
    "FitContext",
    "FittedMethod",
    "Method",
    "Outcome",
    "baseline",
    "known_methods",
    "parse_method",
    "plain_answers",
    "plain_divergence",
    "plain_outcome",
]

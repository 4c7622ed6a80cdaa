"""Selection criteria that rank visual tokens inside the decoder, from its own state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dop_search.pruning.in_decoder.base import StageRanking, StageSample, StageSelector
from dop_search.pruning.in_decoder.dart import DartSelector
from dop_search.pruning.in_decoder.entropyprune import EntropyPruneSelector
from dop_search.pruning.in_decoder.fitprune import FitPruneSelector
from dop_search.pruning.in_decoder.ivc_prune import IvcPruneSelector
from dop_search.pruning.in_decoder.last_token import FastVSelector, FlowCutSelector, PyramidDropSelector
from dop_search.pruning.in_decoder.sparsevlm import AdaptInferSelector, SparseVlm2Selector, SparseVlmSelector
from dop_search.utils.errors import DopError
from dop_search.utils.registry import Registry, did_you_mean

_SELECTORS: tuple[type[StageSelector], ...] = (
    FastVSelector,
    PyramidDropSelector,
    FlowCutSelector,
    SparseVlmSelector,
    SparseVlm2Selector,
    AdaptInferSelector,
    DartSelector,
    EntropyPruneSelector,
    FitPruneSelector,
    IvcPruneSelector,
)
STAGE_SELECTORS = Registry("in-decoder selector", {selector.name: selector for selector in _SELECTORS}, DopError)


def make_stage_selector(name: str, options: Mapping[str, Any]) -> StageSelector:
    """The in-decoder criterion of that name; its option ``before`` is about what happens before the decoder. DopError
    on an unknown name or option."""
    if name not in STAGE_SELECTORS:
        raise DopError(
            f"selector {name!r} cannot rank at `stages` inside the decoder; "
            f"{', '.join(sorted(STAGE_SELECTORS))} can. {did_you_mean(name, STAGE_SELECTORS)}".strip()
        )
    options = {option: value for option, value in options.items() if option != "before"}
    known = STAGE_SELECTORS[name].option_names()
    unknown = [option for option in options if option not in known]
    if unknown:
        raise DopError(f"selector {name!r} has no option {unknown}; it has {list(known)}")
    return STAGE_SELECTORS[name](**{**options, "stages": tuple(options["stages"])})


__all__ = ["STAGE_SELECTORS", "StageRanking", "StageSample", "StageSelector", "make_stage_selector"]

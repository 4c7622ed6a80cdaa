"""VScan and FlowCut: tokens are chosen before the decoder, and a share of them stays inside it.

VScan (Zhang et al., TMLR 2026, arXiv 2505.22654) chooses and merges by
:class:`dop_search.selectors.vscan.VScanSelector`; its name as a method is that stage alone. Halfway up the decoder a
third stays, by the attention of the prompt's last token in the layer that comes next, which is PyramidDrop's criterion;
on Qwen2.5-VL before rotation, as released. Published: 96 tokens, then 32 from layer 16 of 32 on, 64 on average; on
Qwen2.5-VL 1/6 (or .6) of the tokens, then a third (.67) of them from layer 14 of 28 on.

FlowCut (Tong et al., NeurIPS 2025, arXiv 2505.19536): patches leave the tower
(:class:`dop_search.selectors.flowcut.FlowCutSelector`), and after the second layer of the decoder, by that layer's
attention and values, half of the tokens do. Published so for Qwen2-VL (2T, then T) and LLaVA-NeXT (T/2 of each tile,
then T in all: of five tiles 2/5 stay, of three 2/3); on LLaVA-1.5 there is no second stage.

The number that enters is solved for FLOPs. Not reproduced: positions, which VScan's code for LLaVA counts anew before
the decoder and inside it, FlowCut's on LLaVA-NeXT, and which stay here, as on Qwen2.5-VL; VScan on LLaVA-NeXT as
released, see the notes in the README of this folder.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy
from dop_search.strategy import Strategy


@dataclass(frozen=True)
class TwoStage(Method):
    """Solved for the number of tokens that enter the decoder.

    Attributes:
        share: of the tokens that enter, those that stay.
    """

    title: ClassVar[str]
    share: ClassVar[float]

    @abstractmethod
    def ranking(self, num_layers: int, has_cls: bool) -> tuple[int, int, str, dict[str, Any]]:
        """At which stage tokens are ranked, from which layer on they are missing, by what, and its options."""

    def strategy(self, num_layers: int, entering: int, has_cls: bool = True) -> Strategy:
        """``entering`` tokens, and a share of them from a layer on; ``has_cls``: whether the tower has a CLS token."""
        stage, leave, name, options = self.ranking(num_layers, has_cls)
        return nested_strategy(
            num_layers,
            [min(leave, num_layers)],
            [entering, round(self.share * entering)],
            num_visual_tokens=entering,
            selector=name,
            selector_options={"stages": [stage], **options},
        )

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        has_cls = context.loaded is None or context.loaded.adapter.has_cls
        make = partial(self.strategy, context.num_layers, has_cls=has_cls)
        entering, strategy = context.solve(make, 1, context.num_visual, flops_ratio, self.title)
        facts = {
            "entering_tokens": entering,
            "kept_tokens": round(self.share * entering),
            "stages": list(strategy.stages),
        }
        return self.fitted(context, flops_ratio, strategy, facts)


@dataclass(frozen=True)
class VScan(TwoStage):
    """A third of the tokens stays from half of the layers on."""

    name = "vscan_two_stage"
    title = "VScan with both stages"
    share = 1 / 3

    def ranking(self, num_layers: int, has_cls: bool) -> tuple[int, int, str, dict[str, Any]]:
        stage, before = max(1, num_layers // 2), {"selector": "vscan"}
        if has_cls:
            return stage, stage, "pyramiddrop", {"before": before}
        return stage, stage, "pyramiddrop", {"rotated": False, "before": {**before, "attention": "received"}}


@dataclass(frozen=True)
class FlowCut(TwoStage):
    """Half of the tokens stays from layer 2 on."""

    name = "flowcut_two_stage"
    title = "FlowCut with both stages"
    share = 1 / 2

    def ranking(self, num_layers: int, has_cls: bool) -> tuple[int, int, str, dict[str, Any]]:
        return 1, 2, self.name, {"before": {"selector": "flowcut"}}

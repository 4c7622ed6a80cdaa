"""Short-LVLM (Ma et al., ACM MM 2025): whole layers are removed for all tokens, least influential first.

Which layers are redundant is measured on important tokens, not on all: here the influence of a layer is ``sum_i w_i
(1 - cos(x_i, y_i))`` of a token's states before and after it, with ``w_i`` the attention probability that the last
prompt token pays token ``i`` in that layer (mean over heads), averaged over the samples. Optionally the gap that the
missing layers leave is bridged by a low-rank map of the final states: a ridge regression from the short model's
states to the full model's on validation samples.

Not reproduced: the paper's formulas for token importance and for the weights of the bridge are not public; these are
stand-ins for both. At equal FLOPs as many layers are removed as the budget asks for, and what is still too much is
taken off by entering with fewer tokens, chosen by the context's selector.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import solve_layers
from dop_search.baselines.fitprune import inputs_of, layer_views
from dop_search.baselines.layer_removal import LowRankRepair, layers_removed
from dop_search.baselines.shortv import from_least
from dop_search.divergence.encoding import EncodedSample
from dop_search.models.adapter import ModelAdapter
from dop_search.models.loading import LoadedModel
from dop_search.strategy import Strategy
from dop_search.strategy.cost import CostModel

MAX_SAMPLES = 64


@dataclass(frozen=True)
class ShortLvlm(Method):
    """Solved for the number of removed layers and the number of tokens that enter.

    Args:
        name: name of the variant.
        repair_rank: rank of the bridge; 0: none.
        order: layers to remove, first first, instead of measuring; must name every layer.
    """

    name: str = "short_lvlm"  # type: ignore[misc]
    repair_rank: int = 0
    order: tuple[int, ...] | None = None
    uses_selector = True

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        layers, visual = context.num_layers, context.num_visual
        order = self.order or removal_order(context)

        def ratio(running: int, kept: int) -> float:
            return self.flops_ratio(context, running, kept) if running else 0.0

        running, kept, notes = solve_layers(ratio, layers, visual, flops_ratio, "Short-LVLM with {} layers")
        removed = tuple(sorted(order[: layers - running]))
        entering = context.entering(kept)
        repair = self._repair(context, removed) if self.repair_rank and removed else None
        achieved = ratio(running, kept)
        return FittedMethod(
            method=self.name,
            target_ratio=flops_ratio,
            flops_ratio=achieved,
            hyperparameters={
                "removed_layers": list(removed),
                "num_visual_tokens": kept,
                "repair_rank": self.repair_rank,
                "repair": None if repair is None else repair.digest,
                **context.ranked(),
            },
            notes=(*notes, *context.pricing.distance_note(achieved, flops_ratio)),
            runtime=lambda model: layers_removed(model, removed, repair=repair, **entering),
        )

    def flops_ratio(self, context: FitContext, running: int, kept: int) -> float:
        """FLOPs of a model of ``running`` layers on ``kept`` tokens, relative to the full model: bridge and selection
        included."""
        short = CostModel(replace(context.dims, num_layers=running), context.counts)
        total = short.total(Strategy.full(running, num_visual_tokens=kept))
        if running < context.num_layers:
            per_token = 2 * 2 * context.dims.hidden_size * self.repair_rank
            total += per_token * sum(item.text + min(kept, item.visual) for item in context.counts)
        entering = Strategy.full(context.num_layers, num_visual_tokens=kept, **context.ranked())
        return total / context.pricing.cost_model.full_total + context.pricing.selection_ratio(entering)

    def _repair(self, context: FitContext, removed: tuple[int, ...]) -> LowRankRepair:
        loaded, teacher = context.needs_model("Short-LVLM's bridge")
        samples = [item.encoded for item in teacher.samples[:MAX_SAMPLES]]
        return bridge(loaded, samples, removed, self.repair_rank)


def bridge(loaded: LoadedModel, samples: Sequence[EncodedSample], removed: Collection[int], rank: int) -> LowRankRepair:
    """From the short model's final states of text tokens to the full model's, with all visual tokens in both."""
    wanted, states = [], []
    for sample in samples:
        norm = [loaded.adapter.final_norm]
        (full,) = inputs_of(norm, loaded.adapter, sample, None)
        with layers_removed(loaded.model, removed):
            (short,) = inputs_of(norm, loaded.adapter, sample, None)
        wanted.append(full[~sample.visual])
        states.append(short[~sample.visual])
    return LowRankRepair.fit(torch.cat(states), torch.cat(wanted), rank)


@torch.inference_mode()
def layer_influence(adapter: ModelAdapter, sample: EncodedSample) -> Tensor:
    """Importance-weighted change that each layer makes to one prompt: ``[num_layers]`` float64."""
    views, last = layer_views(adapter, sample)
    after = [*[view.hidden for view in views[1:]], last]
    result = []
    for view, behind in zip(views, after, strict=True):
        row = torch.tensor([len(view.hidden) - 1], device=view.hidden.device)
        weight = view.attention(row).mean(dim=0)[0].double()
        change = 1.0 - torch.nn.functional.cosine_similarity(view.hidden.double(), behind.double(), dim=1)
        result.append((weight * change).sum())
    return torch.stack(result)


def removal_order(context: FitContext) -> tuple[int, ...]:
    """Layers from the least to the greatest influence, measured once per context; ties start at the deepest."""
    loaded, teacher = context.needs_model("Short-LVLM")

    def measured() -> tuple[int, ...]:
        influences = [layer_influence(loaded.adapter, item.encoded) for item in teacher.samples[:MAX_SAMPLES]]
        return from_least(torch.stack(influences).mean(dim=0).tolist())

    return context.once("short_lvlm", measured)

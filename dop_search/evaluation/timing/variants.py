"""What is timed beside the full model, each solved for the same FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from dop_search.evaluation.timing.reductions import dropped_by_hooks, kept_columns, reduced_before_decoder
from dop_search.models.adapter import ModelAdapter
from dop_search.pruning import pruned
from dop_search.strategy import Strategy
from dop_search.strategy.cost import CostModel, full_flops
from dop_search.strategy.cost.flops import LayerCounts, total_flops
from dop_search.strategy.operations import ModelDims, TokenCounts

Kind = Literal["full", "empty", "strategy", "bound", "hooks"]

DEPTH_RATIOS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {"uniform": (1.0, 1.0, 1.0), "tied": (0.75, 0.75, 0.5), "split": (0.25, 0.75, 0.25)}
)
"""Built-in shapes of strategy: depth ratios of q, kv and mlp; the number of visual tokens is solved for."""

HOOK_LAYER = 2
"""Where the hook baseline drops tokens, as FastV does (arXiv 2403.06764)."""
FLOPS_TOLERANCE = 0.01


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        kind: ``full`` and ``empty`` run everything, ``strategy`` is ours, ``bound`` and ``hooks`` are independent.
        flops_ratio: of the decoder's prefill, relative to the full model.
        enter: makes the context in which the model runs that way.
        target_ratio: what it was solved for, ``None`` for what was given.
        strategy, num_visual_tokens: for ours, and for the others.
    """

    name: str
    kind: Kind
    flops_ratio: float
    enter: Callable[[], AbstractContextManager[Any]]
    target_ratio: float | None = None
    strategy: Strategy | None = None
    num_visual_tokens: int | None = None

    @property
    def off_target(self) -> float | None:
        """How far the FLOPs are from what was asked for, relative; ``None`` if nothing was asked for."""
        return None if self.target_ratio is None else self.flops_ratio / self.target_ratio - 1.0

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "name": self.name,
            "kind": self.kind,
            "flops_ratio": self.flops_ratio,
            "target_ratio": self.target_ratio,
            "strategy": None if self.strategy is None else self.strategy.to_json(),
            "describe": None if self.strategy is None else self.strategy.describe(),
            "num_visual_tokens": self.num_visual_tokens,
        }


@dataclass(frozen=True)
class Prompt:
    """What is fed: equal samples of these token counts."""

    inputs: dict[str, Tensor]
    visual: Tensor
    counts: TokenCounts

    @classmethod
    def of(cls, adapter: ModelAdapter, inputs: dict[str, Tensor]) -> Prompt:
        """Count the tokens of ``inputs``."""
        visual = adapter.visual_token_mask(inputs["input_ids"])
        return cls(inputs, visual, TokenCounts.of_prompt(visual[0].cpu().numpy()))


def make_variants(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    prompt: Prompt,
    strategies: Mapping[str, Strategy],
    ratios: Sequence[float],
    depths: Sequence[str] = tuple(DEPTH_RATIOS),
    selector: str = "uniform_grid",
    compile: bool = False,
) -> tuple[list[Variant], list[str]]:
    """The full model, the empty strategy, the given strategies, and at each ratio the built-in ones and two baselines;
    and a line for each that cannot reach its FLOPs. ``compile`` is for ours: the layers through ``torch.compile``."""
    dims, counts = adapter.dims, prompt.counts
    cost = CostModel(dims, [counts])
    variants = [
        Variant("full model", "full", 1.0, nullcontext),
        _ours("empty strategy", model, Strategy.full(dims.num_layers), cost, None, kind="empty"),
    ]
    variants += [_ours(name, model, strategy, cost, None, compile=compile) for name, strategy in strategies.items()]
    missing: list[str] = []
    for ratio in ratios:
        candidates = [_dropping(model, prompt, dims, ratio, layer) for layer in (0, HOOK_LAYER)]
        for name in depths:
            found = fit(DEPTH_RATIOS[name], ratio, cost, counts.visual, selector)
            ours = None if found is None else _ours(name, model, found, cost, ratio, compile=compile)
            candidates.append(ours or f"{name} at {ratio:g}: the text alone costs {cost.floor_ratio:.3f} of the FLOPs")
        for item in candidates:
            if isinstance(item, str):
                missing.append(item)
                continue
            variants.append(item)
            if item.off_target is not None and abs(item.off_target) > FLOPS_TOLERANCE:
                missing.append(f"{item.name} at {ratio:g}: nearest is {item.flops_ratio:.4f}, a token is that coarse")
    return variants, missing


def _ours(
    name: str,
    model: PreTrainedModel,
    strategy: Strategy,
    cost: CostModel,
    target: float | None,
    kind: Kind = "strategy",
    compile: bool = False,
) -> Variant:
    ratio = 1.0 if kind == "empty" else cost.ratio(strategy)
    return Variant(name, kind, ratio, lambda: pruned(model, strategy, compile=compile), target, strategy)


def fit(
    depth_ratios: tuple[float, float, float], ratio: float, cost: CostModel, num_visual: int, selector: str
) -> Strategy | None:
    """A strategy of about these depth ratios at the given FLOPs ratio.

    If all visual tokens fit within the ratio, MLPs get deeper, layer by layer, then queries, until they don't; then the
    number of visual tokens that comes nearest is taken. ``None`` if not even one token fits.
    """
    layers = cost.dims.num_layers
    q, kv, mlp = (round(depth * layers) for depth in depth_ratios)

    def at(tokens: int) -> Strategy:
        return Strategy.depthwise(layers, q, kv, mlp, num_visual_tokens=tokens, selector=selector)

    while cost.ratio(at(num_visual)) < ratio and q < layers:
        q, mlp = (q, mlp + 1) if mlp < layers else (q + 1, mlp)
        kv = max(kv, q, mlp)
    tokens = nearest(lambda count: cost.ratio(at(count)), ratio, num_visual)
    return at(tokens) if tokens else None


def nearest(ratio_of: Callable[[int], float], ratio: float, most: int) -> int:
    """The number of tokens in ``0..most`` whose (rising) ratio is nearest to ``ratio``."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ratio_of(middle) <= ratio else (low, middle - 1)
    above = min(low + 1, most)
    return above if abs(ratio_of(above) - ratio) < abs(ratio_of(low) - ratio) else low


def dropping_flops(dims: ModelDims, counts: TokenCounts, num_kept: int, first_layer: int) -> int:
    """FLOPs of a plain decoder that drops visual tokens in front of ``first_layer``; nothing dead is left out."""
    tokens = [counts.text + num_kept if layer >= first_layer else counts.total for layer in range(dims.num_layers)]
    return total_flops(dims, LayerCounts.everything(tokens))


def _dropping(model: PreTrainedModel, prompt: Prompt, dims: ModelDims, ratio: float, first_layer: int) -> Variant | str:
    """The bound (``first_layer=0``) or the hook baseline, or why it cannot reach its FLOPs."""
    counts, full = prompt.counts, full_flops(dims, prompt.counts)

    def ratio_of(kept: int) -> float:
        return dropping_flops(dims, counts, kept, first_layer) / full

    kept = nearest(ratio_of, ratio, counts.visual)
    kind: Kind = "hooks" if first_layer else "bound"
    name = f"hooks at layer {first_layer}" if first_layer else "reduced before the decoder"
    if not kept:
        what = "the layers before it and the text cost" if first_layer else "without visual tokens there remain"
        return f"{name} at {ratio:g}: {what} {ratio_of(0):.3f} of the FLOPs"
    columns = kept_columns(prompt.visual, kept)

    def enter() -> AbstractContextManager[Any]:
        if first_layer:
            return dropped_by_hooks(model, columns, counts.total, first_layer)
        return reduced_before_decoder(model, columns, counts.total)

    return Variant(name, kind, ratio_of(kept), enter, ratio, num_visual_tokens=kept)

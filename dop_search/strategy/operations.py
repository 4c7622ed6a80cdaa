"""The nouns of operation pruning: modules, operations, token groups, model and token sizes.

Source: Liu et al., *Fine-grained Token Allocation Via Operation Pruning for Efficient MLLMs*
(arXiv 2507.02909), section 3. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum, StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dop_search.utils.errors import StrategyError


class Module(StrEnum):
    """What a decoder layer can do for a group of visual tokens.

    ``Q`` and ``KV`` are the two sides of multi-head attention (the paper's MHA is both, tied):
    a token with ``Q`` issues a query and receives attention output, a token with ``KV`` offers a key
    and a value to the others. ``MLP`` is the feed-forward block.
    """

    Q = "q"
    KV = "kv"
    MLP = "mlp"


MODULES: tuple[Module, ...] = (Module.Q, Module.KV, Module.MLP)
"""The order of the module axis wherever operations are stored as an array ``[group, layer, module]``."""


@dataclass(frozen=True, order=True)
class Operation:
    """One module of one decoder layer processing one group of visual tokens."""

    group: int
    layer: int
    module: Module


@dataclass(frozen=True)
class TokenGroup:
    """A range of ranks among the kept visual tokens: ``share`` of them, after the groups before it."""

    share: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise StrategyError(f"`0 < share <= 1` must hold for a token group, but got (share={self.share})")


def group_sizes(groups: tuple[TokenGroup, ...], num_tokens: int) -> tuple[int, ...]:
    """Cut ``num_tokens`` ranked tokens into groups; the cumulative shares are rounded, so sizes add up. StrategyError
    if the shares do not sum to 1."""
    total = sum(group.share for group in groups)
    if abs(total - 1.0) > 1e-6:
        raise StrategyError(f"the shares of the token groups must sum to 1, but got {total} from {groups}")
    sizes, start, cumulative = [], 0, 0.0
    for group in groups:
        cumulative += group.share
        end = min(num_tokens, int(cumulative * num_tokens + 0.5 + 1e-9))
        sizes.append(end - start)
        start = end
    sizes[-1] += num_tokens - start
    return tuple(sizes)


@dataclass(frozen=True)
class RecurrentDims:
    """The layers of a decoder that carry a state from token to token instead of attending, and their sizes.

    Attributes:
        layers: their numbers.
        in_width: features that are projected for a token that updates the state or reads it.
        out_width: features of gate and output projection, of a token that reads it.
        state_size: numbers in the recurrent state of a sample, kept in float32.
        window_size: numbers that the short convolution keeps of a sample.
        working_size: float32 numbers per token that a kernel which is not fused holds at most.
    """

    layers: tuple[int, ...]
    in_width: int
    out_width: int
    state_size: int
    window_size: int
    working_size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # a list in JSON


@dataclass(frozen=True)
class OtherHeads:
    """The layers of a decoder whose attention has other heads than that of the others.

    Attributes:
        layers: their numbers.
        num_kv_heads, head_dim: as in :class:`ModelDims`.
        values_are_keys: whether one projection makes both.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    values_are_keys: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))


class LayerKind(IntEnum):
    """Layers of a kind cost the same."""

    ATTENTION = 0
    RECURRENT = 1
    OTHER_HEADS = 2


@dataclass(frozen=True)
class ModelDims:
    """The sizes of a decoder that its cost depends on.

    With experts ``intermediate_size`` is the width of one of ``num_experts``, of which a token runs
    ``active_experts`` and the router, and one that is shared, of ``shared_expert_size``, with its gate where
    ``shared_expert_gate``. With ``gated_queries`` the query projection makes a gate of the same width.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated_mlp: bool = True
    vocab_size: int = 0
    num_experts: int = 0
    active_experts: int = 1
    shared_expert_size: int = 0
    gated_queries: bool = False
    recurrent: RecurrentDims | None = None
    shared_expert_gate: bool = True
    other_heads: OtherHeads | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelDims:
        """Inverse of ``dataclasses.asdict``."""
        recurrent, others = data.get("recurrent"), data.get("other_heads")
        parts = {
            "recurrent": None if recurrent is None else RecurrentDims(**recurrent),
            "other_heads": None if others is None else OtherHeads(**others),
        }
        return cls(**{**data, **parts})

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Of each layer."""
        kinds = [LayerKind.ATTENTION] * self.num_layers
        for part, kind in ((self.other_heads, LayerKind.OTHER_HEADS), (self.recurrent, LayerKind.RECURRENT)):
            for layer in () if part is None else part.layers:
                if layer < self.num_layers:  # a shortened decoder keeps the numbers of the full one
                    kinds[layer] = kind
        return tuple(kinds)

    def of_kind(self, kind: LayerKind) -> ModelDims:
        """The sizes that count in the layers of a kind that attends."""
        if kind != LayerKind.OTHER_HEADS or (others := self.other_heads) is None:
            return self
        return replace(self, num_kv_heads=others.num_kv_heads, head_dim=others.head_dim)

    @property
    def mlp_width(self) -> int:
        """Width of all that a token runs of the MLP."""
        return self.intermediate_size * self.active_experts + self.shared_expert_size

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together; smaller than the queries' with grouped-query attention."""
        return self.num_kv_heads * self.head_dim

    def fingerprint(self, model_type: str) -> str:
        """A short hash of the architecture, weights left out: a fine-tuned model keeps its strategies."""
        newer = [item for item in fields(self) if item.name not in _FIRST]  # than the first fingerprints
        usual = {item.name for item in newer if getattr(self, item.name) == item.default}
        sizes = {name: size for name, size in asdict(self).items() if name not in usual}
        text = json.dumps({"model_type": model_type, **sizes}, sort_keys=True)
        return f"{model_type}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


_FIRST = frozenset(item.name for item in fields(ModelDims)[:8])


@dataclass(frozen=True)
class TokenCounts:
    """How many text and visual tokens one sample brings into the decoder at prefill.

    Attributes:
        text, visual: tokens.
        several: visual tokens of each image, where there are several.
    """

    text: int
    visual: int
    several: tuple[int, ...] = ()

    @classmethod
    def of_prompt(cls, visual: Sequence[bool] | NDArray[np.bool_], images: Sequence[int] = ()) -> TokenCounts:
        """Of a prompt by whether each of its tokens is visual.

        Its last token counts as text, whatever it is: it always runs every operation, since its logits are read.

        Args:
            visual: ``[length]``.
            images: visual tokens of each image; one image by default.
        """
        num_visual = int(np.count_nonzero(visual[:-1]))
        several = list(images) if len(images) > 1 else []
        if several:
            several[-1] -= int(visual[-1])
        return cls(text=len(visual) - num_visual, visual=num_visual, several=tuple(several))

    @property
    def images(self) -> tuple[int, ...]:
        """Visual tokens of each image."""
        return self.several or (self.visual,)

    @property
    def total(self) -> int:
        """Length of the prefill sequence."""
        return self.text + self.visual

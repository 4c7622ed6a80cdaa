"""In which order the layers of many strategies are computed: shared prefixes once, few states held at a time.

Strategies that agree up to some layer share a path in a trie of layer steps. Where paths part, the lighter branches are
walked first and the heaviest takes the state with it, so that at most ``log2(candidates)`` states wait at any time.
The order is data and knows no tensors: the engine carries it out, a plan counts it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dop_search.strategy import Strategy
from dop_search.strategy.steps import Groups, LayerStep


@dataclass(frozen=True)
class Candidate:
    """One strategy: its number, and what it does in every layer."""

    index: int
    steps: tuple[LayerStep, ...]


@dataclass(frozen=True)
class Load:
    """Take the full model's state before ``layer``, or before layer 0 what a strategy's tokens are."""

    layer: int
    target: int


@dataclass(frozen=True)
class Run:
    """Compute a layer from the state ``source`` that holds the groups ``before``; ``last``: nothing else needs it."""

    layer: int
    before: Groups
    step: LayerStep
    source: int
    target: int
    last: bool


@dataclass(frozen=True)
class Emit:
    """The state ``source`` is the last one of these candidates; nothing else needs it."""

    source: int
    before: Groups
    indices: tuple[int, ...]


Operation = Load | Run | Emit


def schedule(candidates: Sequence[Candidate], all_groups: Groups, early_start: bool) -> Iterator[Operation]:
    """The operations that compute the last states of all candidates.

    Args:
        candidates: strategies that keep the same tokens and cut them into the same groups.
        all_groups: groups that enter the decoder.
        early_start: the full model's own states are right up to the first layer that a candidate changes.

    Returns:
        Loads come in the order of the layers, so that the full model's states can be computed on the way.
    """
    slots = itertools.count()
    if early_start:
        return _walk(candidates, 0, None, all_groups, all_groups, slots)
    start = next(slots)
    return itertools.chain([Load(0, start)], _walk(candidates, 0, start, all_groups, all_groups, slots))


def _walk(
    candidates: Sequence[Candidate],
    layer: int,
    state: int | None,
    before: Groups,
    all_groups: Groups,
    slots: Iterator[int],
) -> Iterator[Operation]:
    """Everything below one node. ``state`` is ``None`` while the full model's own states are right."""
    num_layers = len(candidates[0].steps)
    while layer < num_layers:
        parts = [(part, _step(part, layer)) for part in sorted(_partition(candidates, layer), key=len)]
        full = [
            state is None and step.q == step.kv == step.mlp == all_groups and layer < num_layers - 1
            for _, step in parts
        ]
        users = [index for index, is_full in enumerate(full) if not is_full]
        if state is None and users:
            source = next(slots)
            yield Load(layer, source)
        else:
            source = -1 if state is None else state
        for index, (part, step) in enumerate(parts):
            if full[index]:
                target, after = None, all_groups
            else:
                target, after = next(slots), step.alive
                yield Run(layer, before, step, source, target, last=index == users[-1])
            if index < len(parts) - 1:
                yield from _walk(part, layer + 1, target, after, all_groups, slots)
            else:
                candidates, state, before = part, target, after
        layer += 1
    assert state is not None
    yield Emit(state, before, tuple(candidate.index for candidate in candidates))


def _partition(candidates: Sequence[Candidate], layer: int) -> Iterable[list[Candidate]]:
    """Candidates that do the same in this layer."""
    parts: dict[tuple[Groups, Groups, Groups], list[Candidate]] = {}
    for candidate in candidates:
        step = candidate.steps[layer]
        parts.setdefault((step.q, step.kv, step.mlp), []).append(candidate)
    return parts.values()


def _step(part: Sequence[Candidate], layer: int) -> LayerStep:
    """What candidates that do the same do; groups stay that any of them needs later."""
    step = part[0].steps[layer]
    alive = frozenset[int]().union(*(candidate.steps[layer].alive for candidate in part))
    return LayerStep(alive, step.q, step.kv, step.mlp)


def buckets(strategies: Sequence[Strategy]) -> Iterable[list[int]]:
    """Strategies that keep the same tokens and cut them into the same groups."""
    found: dict[tuple[object, ...], list[int]] = {}
    for index, strategy in enumerate(strategies):
        key = (strategy.num_visual_tokens, strategy.per_image, tuple(policy.group.share for policy in strategy.groups))
        found.setdefault(key, []).append(index)
    return found.values()

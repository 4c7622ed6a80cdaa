"""Staged selection written out on the masked dense reference: hooks read states and attention, loops score them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dop_search.strategy import Strategy
from dop_search.strategy.stages import stage_pools
from dop_search.testing.inputs import Inputs
from dop_search.testing.reference import masked_forward, visual_positions


@dataclass
class Seen:
    """What a layer was given and what its eager attention did, for one unpadded sample; ``here`` are live positions."""

    layer: Any
    hidden: Tensor
    attention: Tensor
    keys: Tensor
    embeddings: Tensor
    text: list[int]
    candidates: list[int]
    here: list[int]


Criterion = Callable[[Seen, int], list[int]]
"""Candidates (positions) best first, given how many go on."""


def look(model: PreTrainedModel, inputs: Inputs, strategy: Strategy, ranking: np.ndarray, layer: int) -> dict[str, Any]:
    """Input, attention weights and keys (before their rotation) of a layer of the masked model."""
    decoder, found = model.model.language_model, {}
    block = decoder.layers[layer]

    def before(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        found["hidden"] = hidden[0]
        found["keys"] = module.self_attn.k_proj(module.input_layernorm(hidden))[0]

    def after(module: Any, args: Any, output: Any) -> None:
        found["attention"] = output[1][0]

    def entrance(module: Any, args: Any, kwargs: Any) -> None:
        found["embeddings"] = (args[0] if args else kwargs["hidden_states"])[0]

    handles = [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.self_attn.register_forward_hook(after),
        decoder.layers[0].register_forward_pre_hook(entrance, with_kwargs=True),
    ]
    try:
        masked_forward(model, inputs, strategy, [ranking])
    finally:
        for handle in handles:
            handle.remove()
    return found


def staged_ranking(
    model: PreTrainedModel,
    inputs: Inputs,
    strategy: Strategy,
    criterion: Criterion,
    before: np.ndarray | None = None,
) -> np.ndarray:
    """The ranking of one unpadded sample that a staged strategy should have ended with (``eager`` attention).

    ``before``: the ranking whose first tokens enter the decoder.
    """
    visual = visual_positions(model, inputs["input_ids"])[0].nonzero()[:, 0].tolist()
    length = inputs["input_ids"].shape[1]
    text = [position for position in range(length) if position not in visual]
    sizes = strategy.group_sizes(len(visual))
    ends = np.cumsum([0, *sizes])
    ranking = np.arange(len(visual)) if before is None else before.copy()
    pools = stage_pools(strategy.groups, strategy.stages, strategy.num_layers)
    after = [*pools[1:], stage_pools(strategy.groups, [strategy.num_layers], strategy.num_layers)[0]]
    for stage, pool, going_on in zip(strategy.stages, pools, after, strict=True):
        alike = tuple(
            replace(policy, q=first.q, kv=first.kv, mlp=first.mlp) if group in pool else policy
            for group, policy in enumerate(strategy.groups)
            for first in [strategy.groups[0]]
        )
        found = look(model, inputs, replace(strategy, groups=alike), ranking, stage)
        alive = [g for g, policy in enumerate(strategy.groups) if g in pool or stage in policy.kv]
        places = [rank for g in range(len(sizes)) if g in pool for rank in range(ends[g], ends[g + 1])]
        candidates = sorted(visual[ranking[rank]] for rank in places)
        live = sorted(visual[ranking[rank]] for g in alive for rank in range(ends[g], ends[g + 1]))
        seen = Seen(
            layer=model.model.language_model.layers[stage],
            text=text,
            candidates=candidates,
            here=sorted([*text, *live]),
            **found,
        )
        order = criterion(seen, sum(sizes[g] for g in going_on))
        assert sorted(order) == candidates
        ranking[places] = [visual.index(position) for position in order]
    return ranking


def by_score(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=lambda position: (-scores[position], position))


def fastv(seen: Seen, num_kept: int) -> list[int]:
    last = seen.here[-1]
    return by_score({i: float(seen.attention[:, last, i].mean()) for i in seen.candidates})


def flowcut(seen: Seen, num_kept: int) -> list[int]:
    """From probabilities: the last query's over all keys, cut to the candidates, is its softmax over them."""
    last, attention = seen.here[-1], seen.layer.self_attn
    states = seen.layer.input_layernorm(seen.hidden[None])
    values = attention.v_proj(states)[0].unflatten(-1, (-1, attention.head_dim)).double()
    score = dict.fromkeys(seen.candidates, 0.0)
    for head in seen.attention.double():
        total = sum(float(head[last, i]) for i in seen.candidates)
        for i in seen.candidates:
            score[i] += float(head[last, i]) / total / len(seen.attention)
    for head in range(values.shape[1]):
        alike = {
            i: math.exp(float(values[last, head] @ values[i, head]) / math.sqrt(attention.head_dim)) for i in score
        }
        for i in seen.candidates:
            score[i] += alike[i] / sum(alike.values()) / values.shape[1]
    return by_score({i: score[i] * float(values[i].mean(dim=0).abs().sum()) for i in seen.candidates})


def raters_of(seen: Seen) -> list[int]:
    everything = [i for i in range(len(seen.hidden)) if i not in seen.text]
    questions = [t for t in seen.text if t > everything[0]]
    relevance = dict.fromkeys(questions, 0.0)
    for v in everything:
        products = torch.stack([seen.embeddings[v] @ seen.embeddings[t] for t in questions]).double()
        for t, share in zip(questions, products.softmax(0).tolist(), strict=True):
            relevance[t] += share / len(everything)
    mean = sum(relevance.values()) / len(relevance)
    return [t for t in questions if relevance[t] > mean]


def sparsevlm(seen: Seen, num_kept: int) -> list[int]:
    raters = raters_of(seen)
    return by_score({i: sum(float(seen.attention[:, t, i].mean()) for t in raters) for i in seen.candidates})


def sparsevlm_v2(seen: Seen, num_kept: int, num_heads: int = 2) -> list[int]:
    """Attention over ``sum_k 2 cos(theta^(-2k/d) distance) / sqrt(d)``, the product of all-ones heads; best heads."""
    dim = seen.layer.self_attn.head_dim
    raters = raters_of(seen)

    def bias(distance: int) -> float:
        return sum(2 * math.cos(distance * 10000.0 ** (-2 * k / dim)) for k in range(dim // 2)) / math.sqrt(dim)

    by_head = [
        {i: sum(float(head[t, i]) / bias(t - i) for t in raters) for i in seen.candidates} for head in seen.attention
    ]
    best = sorted(by_head, key=lambda scores: -sum(scores.values()))[:num_heads]
    return by_score({i: sum(scores[i] for scores in best) for i in seen.candidates})


def dart(seen: Seen, num_kept: int, num_pivots: int = 4) -> list[int]:
    size = {i: float(seen.keys[i].abs().sum()) for i in seen.here}
    visual = by_score({i: size[i] for i in seen.candidates})[:num_pivots]
    words = by_score({i: size[i] for i in seen.text if i > seen.candidates[0]})[:num_pivots]
    states = seen.layer.input_layernorm(seen.hidden[None])[0]
    chosen = list(visual)
    wanted = max(0, num_kept - len(chosen))
    pivots = [*visual, *words]
    for number, pivot in enumerate(pivots):
        share = wanted // len(pivots) + (1 if number < wanted % len(pivots) else 0)
        for _ in range(share):
            pool = [i for i in seen.candidates if i not in chosen]
            likeness = {i: float(torch.cosine_similarity(states[pivot], states[i], dim=0)) for i in pool}
            chosen.append(min(pool, key=lambda i: (likeness[i], i)))
    return [*chosen, *[i for i in seen.candidates if i not in chosen]]


def adaptinfer(seen: Seen, num_kept: int) -> list[int]:
    words, score = [t for t in seen.text if t > seen.candidates[0]], dict.fromkeys(seen.candidates, 0.0)
    for head in seen.attention:
        for t in words:
            weight = sum(float(head[t, u] + head[u, t]) for u in words if u != t) + float(head[t, t])
            for i in seen.candidates:
                score[i] += weight * float(head[t, i])
    return by_score(score)


def entropyprune(seen: Seen, num_kept: int) -> list[int]:
    """Singular values of a token's queries, one row per head and centred, instead of eigenvalues of their products."""
    attention = seen.layer.self_attn
    queries = attention.q_proj(seen.layer.input_layernorm(seen.hidden[None]))[0].unflatten(-1, (-1, attention.head_dim))

    def entropy(i: int) -> float:
        rows = queries[i].double() - queries[i].double().mean(dim=0)
        shares = [max(float(s) ** 2 / len(rows), 1e-10) for s in torch.linalg.svdvals(rows)]
        shares += [1e-10] * (len(rows) - len(shares))
        return -sum(share * math.log(share) for share in shares)

    return by_score({i: entropy(i) for i in seen.candidates})


def ivc_prune(seen: Seen, num_kept: int) -> list[int]:
    """Value tokens with a quarter as many positions of either kind, until there are enough."""
    attention = seen.layer.self_attn
    dim = attention.head_dim
    values = attention.v_proj(seen.layer.input_layernorm(seen.hidden[None]))[0].unflatten(-1, (-1, dim))

    def likeness(anchors: list[int]) -> list[int]:
        score = dict.fromkeys(seen.candidates, 0.0)
        for row in anchors:
            for head in range(values.shape[1]):
                products = torch.stack([values[row, head] @ values[j, head] for j in seen.here]).double()
                for j, share in zip(seen.here, (products / math.sqrt(dim)).softmax(0).tolist(), strict=True):
                    if j in score:
                        score[j] += share
        return by_score(score)

    def turned(function: Callable[[float], float]) -> list[int]:
        return by_score(
            {i: sum(function(i * 10000.0 ** (-2 * k / dim)) for k in range(dim // 2)) for i in seen.candidates}
        )

    after = [t for t in seen.text if t > seen.candidates[0]]
    question = after[2:] or after
    seeds = likeness(question)[: max(1, round(len(seen.candidates) / 100))]
    by_value, by_cos, by_sin = likeness([*seeds, *question]), turned(math.cos), turned(math.sin)
    chosen, count = list(seeds), 0
    while len(chosen) < num_kept:
        count += 1
        for i in [*by_value[:count], *by_cos[: round(count / 4)], *by_sin[: round(count / 4)]]:
            if i not in chosen and len(chosen) < num_kept:
                chosen.append(i)
    return [*chosen, *[i for i in by_value if i not in chosen]]


def fitprune(seen: Seen, num_kept: int) -> list[int]:
    def received(i: int, rows: list[int]) -> float:
        return sum(max(float(head[row, i]) for head in seen.attention) for row in rows)

    return by_score({i: received(i, seen.candidates) * received(i, seen.text) for i in seen.candidates})

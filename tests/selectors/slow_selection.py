"""Token selection by the papers' formulas, token by token, in float64: slow, and independent of the package."""

from __future__ import annotations

import itertools
import math

import numpy as np

from dop_search.selectors import SelectorInputs


def array(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def best(scores: np.ndarray, count: int) -> list[int]:
    """The ``count`` highest, best first, ties by index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def visionzip(inputs: SelectorInputs, dominant: int, contextual: int, cls_token: bool):
    """Kept patches, and ``{token: feature}``; ``-1`` stands for the CLS token."""
    attention, keys, features = array(inputs.cls_attention), array(inputs.keys), array(inputs.features)
    kept = best(attention, dominant - cls_token)
    rest = [token for token in range(len(attention)) if token not in kept]
    step = len(rest) // contextual
    targets = [rest[index * step] for index in range(contextual)]
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest:
        if token not in targets:
            assigned[max(targets, key=lambda t: cosine(keys[token], keys[t]))].append(token)
    merged = {}
    for target, tokens in assigned.items():
        merged[target] = features[target].copy()
        if tokens:
            merged[target] += sum(features[token] for token in tokens) / len(tokens)
    if cls_token:
        merged[-1] = array(inputs.cls_feature)[0]
    return kept, merged


def prumerge_plus(inputs: SelectorInputs, num_kept: int, num_neighbors: int):
    """Kept patches without the summary, and their features; the summary is ``-1``."""
    attention, keys, features = array(inputs.last_cls_attention), array(inputs.last_keys), array(inputs.features)
    ordered = sorted(attention)
    quartile = [np.percentile(ordered, 25), np.percentile(ordered, 75)]
    limit = quartile[1] + 1.5 * (quartile[1] - quartile[0])
    kept = [token for token in best(attention, len(attention)) if attention[token] > limit][: num_kept - 1]
    rest = [token for token in range(len(attention)) if token not in kept]
    missing = num_kept - 1 - len(kept)
    kept += [rest[math.floor(index * len(rest) / missing)] for index in range(missing)]
    merged = {}
    for token in kept:
        others = sorted((t for t in range(len(attention)) if t != token), key=lambda t: -cosine(keys[token], keys[t]))
        merged[token] = features[token] + sum(attention[t] * features[t] for t in others[:num_neighbors])
    merged[-1] = sum(attention[t] * features[t] for t in range(len(attention)) if t not in kept)
    return kept, merged


def divprune(inputs: SelectorInputs, num_kept: int) -> list[int]:
    embeds = array(inputs.embeds)
    tokens = range(len(embeds))

    def distance(i: int, j: int) -> float:
        return 1.0 - cosine(embeds[i], embeds[j])

    chosen = [max(tokens, key=lambda i: min(distance(i, j) for j in tokens if j != i))]
    while len(chosen) < num_kept:
        free = [token for token in tokens if token not in chosen]
        chosen.append(max(free, key=lambda i: min(distance(i, j) for j in chosen)))
    return chosen


def vispruner(inputs: SelectorInputs, num_kept: int, share: float, step: int) -> set[int]:
    attention, features = array(inputs.cls_attention), array(inputs.features)
    order = best(attention, len(attention))
    important = order[: math.floor(share * num_kept)]
    pool = [token for token in order if token not in important]
    while len(pool) > num_kept - len(important) > 0:
        even, odd = pool[0::2], pool[1::2]
        duplicity = [max(cosine(features[e], features[o]) for o in odd) for e in even]
        even = [even[i] for i in best(np.array(duplicity), len(even))]
        pool = even[min(step, len(pool) - (num_kept - len(important))) :] + odd
    return set(important) | set(pool[: num_kept - len(important)])


def cdpruner(embeds: np.ndarray, similarity: np.ndarray, num_kept: int, theta: float | None = None) -> list[int]:
    """Greedy maximisation of the determinant itself."""
    low, high = similarity.min(), similarity.max()
    relevance = (similarity - low + 1e-6) / (high - low + 1e-6)
    if theta is not None:
        relevance = np.exp(theta / (2 * (1 - theta)) * relevance)
    count = len(embeds)
    kernel = np.array(
        [[relevance[i] * cosine(embeds[i], embeds[j]) * relevance[j] for j in range(count)] for i in range(count)]
    )
    chosen: list[int] = []
    for _ in range(num_kept):
        free = [token for token in range(count) if token not in chosen]
        chosen.append(max(free, key=lambda i: np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1]))
    return chosen


def holov(inputs: SelectorInputs, num_kept: int, num_segments: int, alpha: float) -> set[int]:
    attention, embeds = array(inputs.cls_attention), array(inputs.embeds)
    size = len(attention) // num_segments
    segments = [list(range(s * size, (s + 1) * size)) for s in range(num_segments)]
    variance = np.zeros(len(attention))
    for segment in segments:
        for i in segment:
            similarities = [cosine(embeds[i], embeds[j]) for j in segment if j != i]
            mean = sum(similarities) / len(similarities)
            variance[i] = sum((s - mean) ** 2 for s in similarities) / len(similarities)
    scores = 1000 * attention + alpha * variance * (1000 * attention).mean() / variance.mean()
    weights = [scores[segment].mean() for segment in segments]
    budgets = apportion(weights, [size] * num_segments, num_kept)
    kept: set[int] = set()
    for segment, budget in zip(segments, budgets, strict=True):
        kept |= set(sorted(segment, key=lambda i: (-attention[i], i))[:budget])
    return kept


def apportion(weights, capacities, total) -> list[int]:
    """Largest remainders with capacities: full parts leave, the rest is cut again."""
    result = [0] * len(weights)
    while sum(result) < total:
        left = total - sum(result)
        free = [i for i in range(len(weights)) if result[i] < capacities[i]]
        ideal = {i: left * weights[i] / sum(weights[j] for j in free) for i in free}
        extra = {i: math.floor(ideal[i] + 1e-9) for i in free}
        by_remainder = sorted(free, key=lambda i: (extra[i] - ideal[i], i))
        for i in by_remainder[: left - sum(extra.values())]:
            extra[i] += 1
        for i in free:
            result[i] = min(capacities[i], result[i] + extra[i])
    return result


def tome_layer(layer, rows: np.ndarray, size: np.ndarray, origin: list[list[int]], count: int):
    """One CLIP encoder layer on one image with ``count`` merges between attention and MLP, head by head.

    ``origin`` lists per row the patches that it stands for (the CLS token is patch ``-1``).
    """
    attention = layer.self_attn
    heads, dim = attention.num_heads, attention.head_dim
    normed = _layer_norm(layer.layer_norm1, rows)
    q, k, v = (_linear(proj, normed) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    mixed = np.zeros_like(rows)
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        scores = q[:, part] @ k[:, part].T / math.sqrt(dim) + np.log(size)[None, :]
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, part] = weights / weights.sum(axis=1, keepdims=True) @ v[:, part]
    rows = rows + _linear(attention.out_proj, mixed)
    metric = k.reshape(len(k), heads, dim).mean(axis=1)
    even, odd = list(range(0, len(rows), 2)), list(range(1, len(rows), 2))
    unit = metric / np.sqrt((metric**2).sum(axis=1, keepdims=True))
    links = []
    for e in even[1:]:  # the first token is CLS
        similarity = unit[odd] @ unit[e]
        links.append((similarity.max(), e, odd[int(similarity.argmax())]))
    links.sort(key=lambda link: -link[0])
    groups = {o: [o] for o in odd}
    gone = set()
    for _, e, o in links[:count]:
        groups[o].append(e)
        gone.add(e)
    order = [[e] for e in even if e not in gone] + [groups[o] for o in odd]
    new_rows = np.stack([sum(size[i] * rows[i] for i in g) / sum(size[i] for i in g) for g in order])
    new_size = np.array([sum(size[i] for i in g) for g in order])
    new_origin = [list(itertools.chain(*(origin[i] for i in g))) for g in order]
    hidden = _linear(layer.mlp.fc1, _layer_norm(layer.layer_norm2, new_rows))
    hidden = hidden / (1 + np.exp(-1.702 * hidden))  # CLIP's quick GELU
    return new_rows + _linear(layer.mlp.fc2, hidden), new_size, new_origin


def _linear(module, rows: np.ndarray) -> np.ndarray:
    return rows @ array(module.weight).T + array(module.bias)


def _layer_norm(module, rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(axis=1, keepdims=True)
    return centred / np.sqrt(rows.var(axis=1, keepdims=True) + module.eps) * array(module.weight) + array(module.bias)

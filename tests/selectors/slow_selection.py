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


def divprune(inputs: SelectorInputs, num_kept: int, lazy: bool = False) -> list[int]:
    embeds = array(inputs.embeds)
    tokens = range(len(embeds))

    def distance(i: int, j: int) -> float:
        return 1.0 - cosine(embeds[i], embeds[j])

    if lazy:
        chosen = [max(tokens, key=lambda i: sum(distance(i, j) for j in tokens))]
    else:
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
    relevance = (similarity - low + 1e-6) / (high - low)
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
    weights = []
    for segment in segments:
        variance = []
        for i in segment:
            similarities = [0.0 if j == i else cosine(embeds[i], embeds[j]) for j in segment]
            mean = sum(similarities) / (size - 1)
            variance.append(sum((s - mean) ** 2 for s in similarities) / (size - 1))
        scaled = [1000 * attention[i] for i in segment]
        factor = alpha * (sum(scaled) / size) / (sum(variance) / size + 1e-6)
        weights.append(sum(a + factor * v for a, v in zip(scaled, variance, strict=True)) / size)
    budgets = [math.floor(num_kept * w / (sum(weights) + 1e-6)) for w in weights]
    for segment in best(np.array(weights), num_kept - sum(budgets)):
        budgets[segment] += 1
    assert max(budgets) <= size, "a case without full segments"
    kept: set[int] = set()
    for segment, budget in zip(segments, budgets, strict=True):
        kept |= set(sorted(segment, key=lambda i: (-attention[i], i))[:budget])
    return kept


def scope(inputs: SelectorInputs, num_kept: int, alpha: float) -> list[int]:
    attention, features = array(inputs.cls_attention), array(inputs.features)
    tokens = range(len(attention))
    similarity = [[cosine(features[i], features[j]) for j in tokens] for i in tokens]
    chosen: list[int] = []
    while len(chosen) < num_kept:
        covered = [max([0.0, *(similarity[i][j] for i in chosen)]) for j in tokens]

        def gain(i: int, covered: list[float] = covered) -> float:
            return attention[i] ** alpha * sum(max(0.0, similarity[i][j] - covered[j]) for j in tokens)

        chosen.append(max((i for i in tokens if i not in chosen), key=gain))
    return chosen


def hiprune(inputs: SelectorInputs, num_kept: int, alpha: float, columns: int) -> set[int]:
    middle, deep = array(inputs.layers["global_attention@middle"]), array(inputs.global_attention)
    kept: set[int] = set()
    for anchor in best(middle, round(alpha * num_kept / 5)):
        for token in (anchor, anchor - 1, anchor + 1, anchor - columns, anchor + columns):
            kept.add(min(max(token, 0), len(middle) - 1))
    for token in best(deep, len(deep)):
        if len(kept) < num_kept:
            kept.add(token)
    return kept


def vscan(inputs: SelectorInputs, num_kept: int, window: int):
    """Kept tokens, and ``{token: embedding}``."""
    (rows, columns), embeds = inputs.image_grids[0], array(inputs.embeds)
    shallow, deep = array(inputs.layers["cls_attention@0.25"]), array(inputs.cls_attention)
    windows = [
        [r * columns + c for r in range(top, min(top + window, rows)) for c in range(left, min(left + window, columns))]
        for top in range(0, rows, window)
        for left in range(0, columns, window)
    ]
    each = int(num_kept / 2) // len(windows)
    kept = [token for part in windows for token in sorted(part, key=lambda i: (-shallow[i], i))[:each]]
    kept += [token for token in best(deep, len(deep)) if token not in kept][: num_kept - len(kept)]
    members: dict[int, list[int]] = {token: [token] for token in kept}
    for token in range(len(deep)):
        if token not in kept:
            members[max(kept, key=lambda k: cosine(embeds[token], embeds[k]))].append(token)
    return kept, {token: embeds[tokens].mean(axis=0) for token, tokens in members.items()}


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


def gprune(embeds: np.ndarray, num_kept: int, threshold: float, temperature: float, steps: int) -> list[int]:
    """What every token has after some steps, per edge; passing on written out edge by edge."""
    count = len(embeds)
    edges = [
        {j: cosine(embeds[i], embeds[j]) for j in range(count) if cosine(embeds[i], embeds[j]) >= threshold}
        for i in range(count)
    ]
    has = [math.sqrt(row @ row) for row in embeds]
    for _ in range(steps):
        after = [0.0] * count
        for i, its in enumerate(edges):
            total = sum(math.exp(value / temperature) for value in its.values())
            for j, value in its.items():
                after[j] += has[i] * math.exp(value / temperature) / total
        has = after
    return best(np.array([value / len(its) for value, its in zip(has, edges, strict=True)]), num_kept)

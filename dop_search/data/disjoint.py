"""Drawing disjoint search, held-out and test samples from pools."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dop_search.data.pools import Pool
from dop_search.data.samples import Sample
from dop_search.utils.errors import DataError


def draw(
    pools: Sequence[tuple[Pool, float]],
    num_samples: int,
    seed: int,
    split: int,
    num_splits: int,
    families: Sequence[str] | None = None,
) -> tuple[Sample, ...]:
    """Samples from each pool in proportion to its weight, the pools in turn.

    An image's content decides which split (``0..num_splits-1``) may use it, so that splits share no image whatever
    their sizes and seeds. ``seed``: of the order in which rows are looked at; ``families``: kinds of question to use.

    Raises:
        DataError: if a pool runs out, saying how many there are.
    """
    sizes = shares([weight for _, weight in pools], num_samples)
    drawn = [
        _draw_one(pool, size, seed, split, num_splits, families)
        for (pool, _), size in zip(pools, sizes, strict=True)
        if size
    ]
    longest = max(len(part) for part in drawn)
    return tuple(part[index] for index in range(longest) for part in drawn if index < len(part))


def shares(weights: Sequence[float], total: int) -> list[int]:
    """``total`` split in proportion to ``weights``, by largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    sizes = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (sizes[i] - exact[i], i))
    for index in order[: total - sum(sizes)]:
        sizes[index] += 1
    return sizes


def split_of(content: bytes, num_splits: int) -> int:
    """The split that a sample with this content (its image, its passage) belongs to."""
    digest = hashlib.sha256(content).digest()
    return int.from_bytes(digest[:8], "little") % num_splits


def joined(images: Sequence[Sequence[str]]) -> list[str]:
    """A name for each sample, given by its images', the same for those that share one, directly or by way of others."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for first, *others in images:
        for other in others:
            parent[root(other)] = root(first)
    return [root(its[0]) for its in images]


def _draw_one(
    pool: Pool, num_samples: int, seed: int, split: int, num_splits: int, families: Sequence[str] | None
) -> list[Sample]:
    found: list[Sample] = []
    for row in np.random.default_rng(seed).permutation(len(pool)):
        sample = pool.sample(int(row))
        if (families is None or sample.family in families) and split_of(sample.content, num_splits) == split:
            found.append(sample)
            if len(found) == num_samples:
                return found
    only = "" if families is None else f" of the families {list(families)}"
    raise DataError(
        f"{pool.label!r} has {len(pool)} samples, of which {len(found)}{only} are for this split (an image's content "
        f"decides which of {num_splits} splits uses it), but {num_samples} are asked for; lower data.num_samples, "
        "data.num_heldout and data.num_test, or use a larger split"
    )

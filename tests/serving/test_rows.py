"""Rows, positions, slots and runs of an engine's steps against a loop over single tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from dop_search.serving.rows import TEXT, Fed, Paging, Rows, Tally, marks
from dop_search.strategy import Strategy

BLOCK = 4
NUM_GROUPS = 3
SUBSETS = [frozenset(s) for n in range(NUM_GROUPS + 1) for s in itertools.combinations(range(NUM_GROUPS), n)]


def test_marks_say_what_was_dropped_and_which_group_a_token_is_in() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, shares = int(rng.integers(1, 2000)), ([1.0], [0.25, 0.75])[int(rng.integers(2))]
        strategy = Strategy.depthwise(4, *[[4] * len(shares)] * 3, int(rng.integers(1, n + 1)), shares)
        ranking = rng.permutation(n)
        kept, channels = marks(strategy, ranking)
        assert kept.tolist() == sorted(ranking[: strategy.num_kept(n)])
        assert channels.max() < 256  # exact in bfloat16
        exact = torch.from_numpy(channels).to(torch.bfloat16)
        fed = Fed.of(torch.ones(len(kept), dtype=torch.bool), exact)
        place, seen = 0, []
        for before, after in zip(fed.before.tolist(), fed.after.tolist(), strict=True):
            seen.append(place + before)
            place += before + 1 + after
        assert seen == kept.tolist()
        assert place == n
        first = strategy.group_sizes(n)[0]
        assert {int(k) for k, g in zip(kept, fed.group, strict=True) if g == 0} == set(ranking[:first].tolist())


@dataclass
class Prompt:
    """A request as a loop sees it: per token its group and original position, and the blocks it is given."""

    tokens: list[tuple[int, int, int, int]]  # group, dropped before, dropped after, original position
    blocks: list[int]
    done: int = 0
    keys: dict[frozenset[int], list[int]] = field(default_factory=dict)


def make_prompt(rng: np.random.Generator, blocks: list[int]) -> Prompt:
    tokens, position = [], 0
    for _ in range(3):
        for _ in range(int(rng.integers(1, 6))):
            tokens.append((TEXT, 0, 0, position))
            position += 1
        size = int(rng.integers(1, 9))
        for index in range(size):
            before, after = int(rng.integers(0, 3)), int(rng.integers(0, 4)) if index == size - 1 else 0
            tokens.append((int(rng.integers(NUM_GROUPS)), before, after, position + before))
            position += before + 1 + after
    tokens += [(TEXT, 0, 0, position + i) for i in range(4)]
    return Prompt(tokens, blocks)


def feed(prompts: list[Prompt], sizes: list[int], tally: Tally) -> Rows:
    chunks = [prompt.tokens[prompt.done : prompt.done + size] for prompt, size in zip(prompts, sizes, strict=True)]
    rows = torch.tensor([token[:3] for chunk in chunks for token in chunk])
    fed = Fed(*rows.T, torch.zeros(len(rows), 0))
    width = max(len(prompt.blocks) for prompt in prompts)
    paging = Paging(
        torch.tensor([0, *np.cumsum(sizes)]),
        torch.tensor([prompt.done + size for prompt, size in zip(prompts, sizes, strict=True)]),
        torch.tensor([prompt.blocks + [0] * (width - len(prompt.blocks)) for prompt in prompts]),
        BLOCK,
    )
    return Rows(fed, paging, tally.advance(fed.counts(NUM_GROUPS), paging))


def test_further_numbers_come_back_exact_from_half_precision() -> None:
    """Digits of 256 in bfloat16, as they come with features; text has none."""
    visual, numbers = torch.tensor([False, True, True]), torch.tensor([[300, 7], [65535, 256]])
    channels = torch.stack([numbers // 256, numbers % 256], dim=2).flatten(1)
    fed = Fed.of(visual, torch.cat([torch.tensor([[1, 2, 0, 3, 0], [0, 0, 2, 0, 1]]), channels], dim=1).bfloat16())
    assert fed.further.tolist() == [[0, 0], [300, 7], [65535, 256]]
    assert (fed.group.tolist(), fed.before.tolist(), fed.after.tolist()) == ([-1, 0, 1], [0, 258, 0], [0, 3, 512])


@pytest.mark.parametrize("seed", range(6))
def test_every_query_sees_the_keys_before_it_and_stands_where_it_stood(seed: int) -> None:
    """Chunks of several requests; what each run finds in a paged cache is what a loop over the prompt lists."""
    rng = np.random.default_rng(seed)
    free = rng.permutation(200).tolist()
    prompts = [make_prompt(rng, [free.pop() for _ in range(20)]) for _ in range(3)]
    tally = Tally(200 * BLOCK, 1 + NUM_GROUPS, torch.device("cpu"))
    caches: dict[frozenset[int], dict[int, tuple[int, int]]] = {keys: {} for keys in SUBSETS}
    while active := [p for p in prompts if p.done < len(p.tokens)]:
        sizes = [int(rng.integers(1, min(7, len(p.tokens) - p.done) + 1)) for p in active]
        rows = feed(active, sizes, tally)
        ids = [(prompts.index(p), p.done + i) for p, size in zip(active, sizes, strict=True) for i in range(size)]
        assert rows.positions.tolist() == [prompts[p].tokens[i][3] for p, i in ids]
        for keys in SUBSETS:
            members = [ids[row] for row in rows.members(keys).tolist()]
            assert members == [(p, i) for p, i in ids if prompts[p].tokens[i][0] in {TEXT, *keys}]
            caches[keys].update(zip(rows.slots(keys).tolist(), members, strict=True))
        for queries, keys in itertools.product(SUBSETS, SUBSETS):
            runs = rows.runs(queries, keys)
            asking = iter(ids[row] for row in rows.members(queries).tolist())
            for request, size, length in zip(runs.request, runs.sizes, runs.lengths, strict=True):
                for step in range(int(size)):
                    prompt, index = next(asking)
                    assert prompts[prompt] is active[int(request)]
                    blocks, seen = prompts[prompt].blocks, int(length) - int(size) + step + 1
                    found = [caches[keys][blocks[i // BLOCK] * BLOCK + i % BLOCK] for i in range(seen)]
                    tokens = prompts[prompt].tokens[: index + 1]
                    assert found == [(prompt, i) for i, t in enumerate(tokens) if t[0] in {TEXT, *keys}]
            assert next(asking, None) is None
        for prompt, size in zip(active, sizes, strict=True):
            prompt.done += size


def test_a_prefix_that_others_fill_in_the_same_step_is_counted() -> None:
    """Three requests with one prompt in one step: the second begins with blocks of the first, the third with more."""
    rng = np.random.default_rng(1)
    first = make_prompt(rng, list(range(10, 30)))
    second = Prompt(first.tokens, [*first.blocks[:2], *range(40, 60)], done=2 * BLOCK)
    third = Prompt(first.tokens, [*second.blocks[:4], *range(70, 90)], done=4 * BLOCK)
    prompts = [third, second, first]
    rows = feed(
        prompts, [len(p.tokens) - p.done for p in prompts], Tally(100 * BLOCK, 1 + NUM_GROUPS, torch.device("cpu"))
    )
    assert rows.positions.tolist() == [token[3] for p in prompts for token in p.tokens[p.done :]]

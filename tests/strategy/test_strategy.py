"""Strategies: canonical form, token groups, depth ratios, JSON; and errors that name the value."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dop_search.selectors import SELECTORS, make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.operations import (
    MODULES,
    ModelDims,
    Module,
    Operation,
    TokenGroup,
    group_sizes,
)
from dop_search.strategy.policy import GroupPolicy
from dop_search.testing.strategies import CORNERS, corner_strategy, dop_strategies
from dop_search.utils.errors import DopError, StrategyError

NUM_LAYERS = 5
PROPERTY = settings(max_examples=100, derandomize=True, database=None, deadline=None)
strategies = dop_strategies(NUM_LAYERS)


def live_operations(strategy: Strategy) -> set[Operation]:
    """Which running operations can reach a text logit, found by following the data flow backwards.

    Written from the definition: a key is read by text; a query or MLP result of a group is read if its state is
    read later, and its state is read by its own keys in deeper layers.
    """
    runs = strategy.to_array()
    live = set()
    for group in range(len(strategy.groups)):
        state_is_read = False
        for layer in reversed(range(strategy.num_layers)):
            for module in (Module.MLP, Module.Q, Module.KV):
                running = runs[group, layer, MODULES.index(module)]
                if running and (module is Module.KV or state_is_read):
                    live.add(Operation(group, layer, module))
            state_is_read = state_is_read or bool(runs[group, layer, MODULES.index(Module.KV)])
    return live


# -- canonical form --------------------------------------------------------------------------------------------------


@PROPERTY
@given(strategy=strategies)
def test_canonical_form_keeps_exactly_the_live_operations(strategy: Strategy) -> None:
    every = itertools.product(range(len(strategy.groups)), range(NUM_LAYERS), MODULES)
    operations = {Operation(*place) for place in every}
    assert operations - set(strategy.skipped()) == live_operations(strategy)


@PROPERTY
@given(strategy=strategies)
def test_canonical_form_is_idempotent_and_only_drops(strategy: Strategy) -> None:
    canonical = strategy.canonical()
    assert canonical.canonical() == canonical
    assert not (canonical.to_array() & ~strategy.to_array()).any()
    assert canonical.key() == strategy.key()


def test_dead_operations_of_the_full_model() -> None:
    """The last layer's queries and MLP of visual tokens change nothing, in the unpruned model already."""
    full = Strategy.full(3)
    assert full.is_empty
    assert full.skipped() == (Operation(0, 2, Module.Q), Operation(0, 2, Module.MLP))
    assert Strategy.depthwise(3, 2, 3, 2).is_empty
    assert not Strategy.depthwise(3, 1, 3, 2).is_empty
    assert not Strategy.depthwise(3, 3, 2, 3).is_empty
    assert not Strategy.full(3, num_visual_tokens=10).is_empty


@pytest.mark.parametrize("corner", CORNERS)
def test_corners_are_not_empty(corner: str) -> None:
    assert not corner_strategy(corner, NUM_LAYERS).is_empty


def test_key_ignores_what_does_not_change_the_function() -> None:
    strategy = Strategy.depthwise(4, 4, 3, 2, num_visual_tokens=9)
    same = replace(strategy, provenance={"note": "another run"}, model_fingerprint="llava-0")
    assert Strategy.depthwise(4, 2, 3, 2, num_visual_tokens=9).key() == same.key() == strategy.key()
    others = [
        Strategy.depthwise(4, 1, 3, 2, num_visual_tokens=9),
        Strategy.depthwise(4, 4, 4, 2, num_visual_tokens=9),
        Strategy.depthwise(4, 4, 3, 2, num_visual_tokens=8),
        replace(strategy, selector="random"),
        replace(strategy, selector_options={"seed": 1}),
    ]
    assert strategy.key() not in {other.key() for other in others}


# -- views -----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(strategy=strategies)
def test_array_round_trip(strategy: Strategy) -> None:
    shares = [policy.group.share for policy in strategy.groups]
    again = Strategy.from_array(
        strategy.to_array(), shares, num_visual_tokens=strategy.num_visual_tokens, selector=strategy.selector
    )
    assert again == strategy


@PROPERTY
@given(strategy=strategies)
def test_depths_describe_exactly_the_depthwise_strategies(strategy: Strategy) -> None:
    depths = strategy.depths()
    runs = strategy.to_array()
    # An exit depth means that a module never comes back once it has stopped.
    assert (depths is not None) == bool((runs[:, 1:] <= runs[:, :-1]).all())
    if depths is not None:
        shares = [policy.group.share for policy in strategy.groups]
        fields: dict[str, Any] = {"num_visual_tokens": strategy.num_visual_tokens, "selector": strategy.selector}
        assert Strategy.depthwise(NUM_LAYERS, **depths, shares=shares, **fields) == strategy


def test_depth_ratios_move_to_another_depth() -> None:
    strategy = Strategy.depthwise(12, q=8, kv=10, mlp=4, num_visual_tokens=72)
    assert strategy.depth_ratios() == {"q": (8 / 12,), "kv": (10 / 12,), "mlp": (4 / 12,)}
    moved = strategy.for_num_layers(24)
    assert (moved.depths(), moved.num_visual_tokens) == ({"q": (16,), "kv": (20,), "mlp": (8,)}, 72)
    assert moved.for_num_layers(12) == strategy
    assert Strategy.full(12).for_num_layers(7) == Strategy.full(7)
    window = Strategy(4, (GroupPolicy(q=(), kv=(1, 2), mlp=()),))
    with pytest.raises(StrategyError, match="free layer sets"):
        window.for_num_layers(8)


def test_description_is_one_readable_line() -> None:
    assert Strategy.depthwise(12, 8, 10, 4, num_visual_tokens=72).describe() == "q≤8 kv≤10 mlp≤4 n_v=72"
    free = Strategy(6, (GroupPolicy(q=(), kv=(1, 2, 3), mlp=(0, 4)),))
    assert free.describe() == "q≤0 kv∈[1,4) mlp∈{0,4} n_v=all"
    groups = Strategy.depthwise(4, 1, [2, 3], 1, shares=[0.25, 0.75])
    assert groups.describe() == "25%: q≤1 kv≤2 mlp≤1 | 75%: q≤1 kv≤3 mlp≤1 n_v=all"


# -- token groups ----------------------------------------------------------------------------------------------------


@PROPERTY
@given(
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    num_tokens=st.integers(0, 3000),
)
def test_group_sizes_add_up_and_are_near_their_shares(weights: list[int], num_tokens: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    sizes = group_sizes(tuple(TokenGroup(share) for share in shares), num_tokens)
    assert sum(sizes) == num_tokens
    assert all(size >= 0 for size in sizes)
    assert all(abs(size - share * num_tokens) <= 1 for size, share in zip(sizes, shares, strict=True))


@pytest.mark.parametrize(
    ("num_visual_tokens", "num_visual", "sizes"),
    [(None, 16, (4, 12)), (8, 16, (2, 6)), (8, 5, (1, 4)), (0, 16, (0, 0)), (2, 16, (1, 1)), (1, 16, (0, 1))],
)
def test_kept_tokens_are_cut_by_rank(num_visual_tokens: int | None, num_visual: int, sizes: tuple[int, int]) -> None:
    strategy = Strategy.depthwise(2, 1, 1, 1, num_visual_tokens, shares=[0.25, 0.75])
    assert strategy.group_sizes(num_visual) == sizes
    assert strategy.num_kept(num_visual) == sum(sizes)


@pytest.mark.parametrize(
    ("num_visual_tokens", "images", "together", "each"),
    [
        (None, (10, 2), (3, 9), (4, 8)),
        (6, (10, 2), (2, 4), (3, 5)),
        (0.5, (10, 2), (2, 4), (1, 5)),
        (0.25, (10, 2, 2), (1, 3), (1, 4)),
        (3, (), (0, 0), (0, 0)),
    ],
)
def test_images_are_counted_together_or_each(
    num_visual_tokens: float | None, images: tuple[int, ...], together: tuple[int, int], each: tuple[int, int]
) -> None:
    """By hand: of 10 tokens a half is 5, cut at 1.25; of 2 it is 1, cut at .25, and a quarter is .5, which is 1."""
    strategy = Strategy.depthwise(2, 1, 1, 1, num_visual_tokens, shares=[0.25, 0.75])
    its = replace(strategy, per_image=True)
    assert (strategy.group_sizes(images), its.group_sizes(images)) == (together, each)
    assert (strategy.num_kept(images), its.num_kept(images)) == (sum(together), sum(each))
    assert its.key() != strategy.key()


def test_files_say_the_oldest_version_that_reads_them() -> None:
    """A strategy that counts per sample is written as ever, and read from files of version 1."""
    old = Strategy.depthwise(4, 2, 3, 1, num_visual_tokens=9)
    assert old.to_json()["version"] == 1
    assert "per_image" not in old.to_json()
    for newer in (replace(old, per_image=True), replace(old, num_visual_tokens=0.25)):
        assert newer.to_json()["version"] == 2
        assert Strategy.from_json(json.loads(json.dumps(newer.to_json()))) == newer != old
    assert replace(old, num_visual_tokens=0.25, per_image=True).describe().endswith("n_v=25% per image")
    with pytest.raises(StrategyError, match="`per_image` must be True or False, but got 1"):
        replace(old, per_image=1)


# -- files -----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(
    strategy=strategies,
    options=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans(), max_size=3),
    fingerprint=st.none() | st.text(max_size=20),
)
def test_json_round_trip(strategy: Strategy, options: dict[str, Any], fingerprint: str | None) -> None:
    strategy = replace(
        strategy,
        selector_options=options,
        model_fingerprint=fingerprint,
        provenance={"kl_nats": 0.25, "options": options},
    )
    again = Strategy.from_json(json.loads(json.dumps(strategy.to_json())))
    assert again == strategy
    assert again.provenance == strategy.provenance
    assert again.to_json() == strategy.to_json()


@pytest.mark.parametrize("corner", CORNERS)
def test_file_round_trip(tmp_path: Path, corner: str) -> None:
    strategy = corner_strategy(corner, NUM_LAYERS)
    path = tmp_path / "new folder" / "strategy.json"
    strategy.save(path)
    assert Strategy.load(path) == strategy
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    """Searches compute in NumPy; their strategies must be savable."""
    strategy = Strategy.depthwise(4, np.int64(1), np.int32(3), [np.int64(2)], num_visual_tokens=np.int64(9))
    strategy.save(tmp_path / "strategy.json")
    assert Strategy.load(tmp_path / "strategy.json") == Strategy.depthwise(4, 1, 3, 2, num_visual_tokens=9)


def valid_json() -> dict[str, Any]:
    return Strategy.depthwise(4, 2, 3, 1, num_visual_tokens=9).to_json()


def broken_group(**changes: Any) -> dict[str, Any]:
    data = valid_json()
    return {**data, "groups": [{**data["groups"][0], **changes}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a strategy"),
        ({}, "not a strategy"),
        ({**valid_json(), "format": "kvpress.press"}, "not a strategy"),
        ({**valid_json(), "version": 3}, "its version is 3, but this dop-search reads 1 or 2"),
        ({**valid_json(), "per_image": True}, r"unknown fields \['per_image'\]"),
        ({**valid_json(), "version": 2, "per_image": 1}, "`per_image` has the wrong type: 1"),
        ({**valid_json(), "version": 2, "num_visual_tokens": 1.0}, "0 < num_visual_tokens < 1"),
        ({**valid_json(), "num_layer": 4}, r"unknown fields \['num_layer'\]"),
        ({k: v for k, v in valid_json().items() if k != "groups"}, r"missing fields \['groups'\]"),
        ({**valid_json(), "num_layers": "4"}, "`num_layers` has the wrong type: '4'"),
        ({**valid_json(), "num_layers": 0}, "num_layers"),
        ({**valid_json(), "num_visual_tokens": 2.5}, "`num_visual_tokens` has the wrong type: 2.5"),
        ({**valid_json(), "num_visual_tokens": True}, "`num_visual_tokens` has the wrong type: True"),
        ({**valid_json(), "num_visual_tokens": -1}, "num_visual_tokens >= 0"),
        ({**valid_json(), "selector": None}, "`selector` has the wrong type: None"),
        ({**valid_json(), "groups": []}, "at least one token group"),
        ({**valid_json(), "groups": [3]}, r"groups\[0\] must be an object, but got 3"),
        (broken_group(q=5), r"0 <= groups\[0\].q <= num_layers.*5"),
        (broken_group(kv=[0, 4]), r"within 0..3, but got \[0, 4\]"),
        (broken_group(kv=[2, 1]), "sorted"),
        (broken_group(kv=[1, 1]), "unique"),
        (broken_group(mlp=["1"]), r"must list layer numbers, but got \['1'\]"),
        (broken_group(mlp=None), "`mlp` has the wrong type: None"),
        (broken_group(heads=1), r"groups\[0\].*unknown fields \['heads'\]"),
        (broken_group(share=0.5), "must sum to 1, but got 0.5"),
        (broken_group(share=0), "0 < share <= 1"),
        (broken_group(share=float("nan")), "0 < share <= 1"),
    ],
)
def test_foreign_json_is_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        Strategy.from_json(data)
    path = tmp_path / "foreign.json"
    path.write_text(json.dumps(data))
    with pytest.raises(StrategyError, match=r"foreign\.json"):
        Strategy.load(path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match=r"there is no strategy at .*nowhere\.json"):
        Strategy.load(tmp_path / "nowhere.json")
    path = tmp_path / "half.json"
    for content in (b"", b'{"format": "dop_se', b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(StrategyError, match=r"half\.json.* is not a JSON file"):
            Strategy.load(path)


# -- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0, "q": 0, "kv": 0, "mlp": 0}, r"1 <= num_layers <= 10000.*num_layers=0"),
        ({"num_layers": 4, "q": 5, "kv": 0, "mlp": 0}, r"q=5, num_layers=4"),
        ({"num_layers": 4, "q": 0, "kv": -1, "mlp": 0}, r"kv=-1"),
        ({"num_layers": 4, "q": 0, "kv": 0, "mlp": [1.5]}, r"mlp=1.5"),
        ({"num_layers": 4, "q": True, "kv": 0, "mlp": 0}, r"q=True"),
        ({"num_layers": 4, "q": [1, 2], "kv": 0, "mlp": 0}, r"`q` needs one depth per token group \(1\)"),
        ({"num_layers": 4, "q": 0, "kv": 0, "mlp": 0, "shares": [0.5, 0.6]}, "must sum to 1"),
        ({"num_layers": 4, "q": 0, "kv": 0, "mlp": 0, "shares": [1.5, -0.5]}, "share=1.5"),
        ({"num_layers": 4, "q": 0, "kv": 0, "mlp": 0, "num_visual_tokens": -3}, "-3"),
    ],
)
def test_wrong_depths_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        Strategy.depthwise(**arguments)


@pytest.mark.parametrize("num_visual_tokens", [2.5, True, "9"])
def test_a_number_of_tokens_is_an_integer(num_visual_tokens: Any) -> None:
    with pytest.raises(StrategyError, match=repr(num_visual_tokens)):
        Strategy.full(4, num_visual_tokens=num_visual_tokens)


@pytest.mark.parametrize("runs", [np.ones((1, 4, 2), bool), np.ones((4, 3), bool), np.ones((1, 4, 3))])
def test_wrong_arrays_are_refused(runs: np.ndarray) -> None:
    with pytest.raises(StrategyError, match="boolean array"):
        Strategy.from_array(runs)
    with pytest.raises(StrategyError, match="one entry per group"):
        Strategy.from_array(np.ones((2, 4, 3), bool), shares=[1.0])


def test_fingerprint_knows_the_architecture_and_nothing_else() -> None:
    dims = ModelDims(num_layers=4, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8)
    assert dims.fingerprint("llava") == replace(dims).fingerprint("llava")
    assert dims.fingerprint("llava").startswith("llava-")
    others = {replace(dims, num_kv_heads=4).fingerprint("llava"), dims.fingerprint("llava_next")}
    assert len({*others, dims.fingerprint("llava")}) == 3
    assert (dims.query_width, dims.kv_width) == (32, 16)


def test_numpy_integers_are_plain_in_the_file(tmp_path: Path) -> None:
    runs = np.arange(4, dtype=np.int64)
    policy = GroupPolicy(q=(runs[0],), kv=tuple(runs[:2]), mlp=())
    strategy = Strategy(np.int64(4), (policy,), np.int32(5))  # type: ignore[arg-type]
    strategy.save(tmp_path / "strategy.json")
    assert Strategy.load(tmp_path / "strategy.json") == strategy


# -- any file --------------------------------------------------------------------------------------------------------

FIELDS = [*valid_json(), *(f"groups.{name}" for name in ("q", "kv", "mlp", "share")), "selector_options.stages", "x"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 6)
    | st.sampled_from([10**9, 10**30, -(10**9), 0.5, 1.0, float("nan"), float("inf"), 1e308, "", "0", "cls_attention"])
    | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["q", "stages", "a"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_any_file_is_a_strategy_or_refused_in_words(changes: dict[str, Any], tmp_path: Path) -> None:
    data = valid_json()
    for name, value in sorted(changes.items(), key=lambda change: "." not in change[0]):
        section, _, key = name.rpartition(".")
        target = data if not section else data["groups"][0] if section == "groups" else data[section]
        target[key] = value
    path = tmp_path / "fuzz.json"
    path.write_text(json.dumps(data))
    try:
        strategy = Strategy.load(path)
    except StrategyError as error:
        message = str(error)
    else:
        Strategy.load(path).save(path)
        assert Strategy.load(path) == strategy
        assert strategy.to_array().shape == (len(data["groups"]), data["num_layers"], 3)
        assert all(isinstance(text, str) for text in (strategy.key(), strategy.describe()))
        assert not {"x", "groups.x"} & set(changes), "an unknown field is no strategy"
        return
    assert "fuzz.json" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[" * 20_000, r"is not a JSON file .maximum recursion depth"),
        (json.dumps({**valid_json(), "num_layers": 10**9}), r"num_layers <= 10000.*1000000000"),
        (
            json.dumps({**valid_json(), "selector_options": {"stages": 5}}),
            r"`stages` must be a list of layers, but got 5",
        ),
        (json.dumps({**valid_json(), "selector_options": {"stages": ["a"]}}), r"`stages` must be increasing layers"),
        (json.dumps({**valid_json(), "selector_options": {"stages": [[1]]}}), r"`stages` must be increasing layers"),
    ],
)
def test_hostile_files_are_refused_at_once(content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "hostile.json").write_text(content)
    with pytest.raises(StrategyError, match=match):
        Strategy.load(tmp_path / "hostile.json")


@pytest.mark.parametrize("name", SELECTORS)
def test_an_option_of_a_selector_has_its_type(name: str) -> None:
    for option in SELECTORS[name].option_names():
        for value in ([1], {}, object(), float("nan")):
            with pytest.raises(DopError, match=rf"option `{option}` of selector '{name}' must be .*, but got"):
                make_selector(name, {option: value})
    with pytest.raises(DopError, match=r"`seed >= 0` must hold, but got \(seed=-1\)"):
        make_selector("random", {"seed": -1})

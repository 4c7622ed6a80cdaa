"""The record is a contract: its keys, its round trip, its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.records import example_record

from dop_search.app.record import RECORD_FILE, SCORES_FILE, EvalRecord, Record, Result
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import CacheError


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    record = example_record()
    record.save(tmp_path / RECORD_FILE)
    for path in (tmp_path / RECORD_FILE, tmp_path):
        loaded = Record.load(path)
        assert loaded == record
        assert loaded == record
    assert list(tmp_path.iterdir()) == [tmp_path / RECORD_FILE]


def test_the_keys_that_everything_downstream_relies_on() -> None:
    data = example_record().model_dump(mode="json")
    assert (data["format"], data["version"]) == ("dop_search.record", 1)
    assert {"model", "data", "selector", "space", "solver", "results"} <= set(data)
    result = data["results"][2]
    assert result["budget"] == 0.15
    assert {
        "strategy", "flops_ratio", "kv_ratio", "kl_additive", "kl_search", "kl_search_ci95", "kl_heldout",
        "kl_heldout_ci95", "accuracy_full", "accuracy_pruned", "uniform", "num_validation_runs", "seconds",
    } <= set(result)  # fmt: skip
    assert {"num_visual_tokens", "flops_ratio", "kl_heldout", "kl_heldout_ci95", "accuracy"} <= set(result["uniform"])
    strategy = Strategy.from_json(result["strategy"])
    assert strategy.depths() == {"q": (3,), "kv": (8,), "mlp": (2,)}


def test_other_budgets_are_mappings() -> None:
    result = example_record().results[0]
    assert (result.budget, result.budget.text) == (Budget(flops_ratio=0.5), "0.5")
    other = Result.model_validate({**result.model_dump(mode="json"), "budget": {"kv_ratio": 0.25}})
    assert other.budget.text == "KV 0.25"
    assert other.model_dump(mode="json")["budget"] == {"kv_ratio": 0.25}


RECORDS = sorted((Path(__file__).parents[2] / "experiments").rglob(RECORD_FILE))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_a_committed_record_loads_and_is_written_as_it_is(path: Path, tmp_path: Path) -> None:
    loaded = Record.load(path)
    loaded.save(tmp_path / RECORD_FILE)
    again = json.loads((tmp_path / RECORD_FILE).read_text(encoding="utf-8"))
    committed = json.loads(path.read_text(encoding="utf-8"))
    assert [item["budget"] for item in again["results"]] == [item["budget"] for item in committed["results"]]
    assert Record.model_validate(again) == loaded


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "version is 2, but this dop-search reads 1"),
        ({"results": []}, "results: "),
        ({"extra": 1}, "extra: "),
        ({"floor_ratio": float("nan")}, "floor_ratio: "),
    ],
)
def test_what_is_wrong_with_a_file_is_said(change: dict[str, object], expected: str, tmp_path: Path) -> None:
    path = tmp_path / RECORD_FILE
    path.write_text(json.dumps({**example_record().model_dump(mode="json"), **change}))
    with pytest.raises(CacheError) as caught:
        Record.load(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_broken_strategy_inside_is_named(tmp_path: Path) -> None:
    data = example_record().model_dump(mode="json")
    data["results"][1]["strategy"]["groups"][0]["kv"] = 99
    (tmp_path / RECORD_FILE).write_text(json.dumps(data))
    with pytest.raises(CacheError, match=r"results\.1\.strategy: .*kv"):
        Record.load(tmp_path)


def test_missing_or_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="directory of a finished run"):
        Record.load(tmp_path / "nothing")
    (tmp_path / RECORD_FILE).write_text("{")
    with pytest.raises(CacheError, match="not a JSON file"):
        Record.load(tmp_path)


def test_candidates_of_several_budgets_count_once() -> None:
    record = example_record()
    twice = record.model_copy(update={"results": [*record.results, record.results[0]]})
    assert len(twice.all_candidates()) == len(record.all_candidates()) == 48


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 10**12)
    | st.floats()
    | st.sampled_from(["", "0.5", "nan", "llava", 1e308, -1.0, [0.1, 0.2], {}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "q"]), inner, max_size=2),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


PLACES = list(places(example_record().model_dump(mode="json")))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.sampled_from(PLACES), value=VALUES, delete=st.booleans())
def test_any_record_is_read_as_it_stands_or_refused_in_words(
    place: tuple[Any, ...], value: Any, delete: bool, tmp_path: Path
) -> None:
    data = example_record().model_dump(mode="json")
    target: Any = data
    for key in place[:-1]:
        target = target[key]
    if delete:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    (tmp_path / RECORD_FILE).write_text(json.dumps(data))
    try:
        record = Record.load(tmp_path)
    except CacheError as error:
        message = str(error)
    else:
        kept: Any = record.model_dump(mode="json")
        for key in place if not delete else ():
            if key == "depth_ratios":
                return  # for readers; computed from the depths
            kept = kept[key]
        first_layers = place[-1] in ("q", "kv", "mlp") and isinstance(kept, int) and value == list(range(kept))
        same = kept == value or (value in (None, {}) and not kept) or first_layers  # a set of the first is a depth
        assert delete or same or place[-1] == "share"
        return
    assert RECORD_FILE in message


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=40) | st.text(alphabet='[]{}",:01eN', max_size=40).map(str.encode))
def test_any_bytes_are_refused_in_words(content: bytes, tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_bytes(content)
    with pytest.raises(CacheError, match=RECORD_FILE):
        Record.load(tmp_path)
    (tmp_path / SCORES_FILE).write_bytes(content)
    with pytest.raises(CacheError, match=SCORES_FILE):
        EvalRecord.load(tmp_path)

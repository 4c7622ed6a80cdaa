"""What ``dop-eval`` reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.score_records import example_evaluation

from dop_search.app.evaluate import read_strategies
from dop_search.app.record import SCORES_FILE, EvalRecord
from dop_search.strategy import Strategy
from dop_search.utils.errors import CacheError, ConfigError


def test_strategies_of_the_same_name_are_called_by_their_folders(tmp_path: Path) -> None:
    files = []
    for folder in ("one", "two"):
        files.append(str(tmp_path / folder / "strategy-0.3.json"))
        Path(files[-1]).parent.mkdir()
        Strategy.full(12).save(files[-1])
    assert list(read_strategies(tuple(files))) == ["one-strategy-0.3", "two-strategy-0.3"]
    assert list(read_strategies((files[0],))) == ["strategy-0.3"]
    (tmp_path / "x" / "one").mkdir(parents=True)
    Strategy.full(12).save(tmp_path / "x" / "one" / "strategy-0.3.json")
    with pytest.raises(ConfigError, match="different names"):
        read_strategies((files[0], str(tmp_path / "x" / "one" / "strategy-0.3.json")))


def test_the_record_round_trips_and_names_what_is_wrong(tmp_path: Path) -> None:
    record = example_evaluation({"a": (Strategy.depthwise(12, 3, 8, 2, 72), 0.15, 0.9)})
    record.save(tmp_path / SCORES_FILE)
    assert EvalRecord.load(tmp_path) == record
    with pytest.raises(CacheError, match="there is no record of dop-eval at"):
        EvalRecord.load(tmp_path / "nothing")
    data = json.loads((tmp_path / SCORES_FILE).read_text())
    (tmp_path / SCORES_FILE).write_text(json.dumps({**data, "version": 2}))
    with pytest.raises(CacheError, match="version"):
        EvalRecord.load(tmp_path)

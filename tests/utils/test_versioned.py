"""A file that is something else is refused in one wording, whatever it should have been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dop_search.app.record import EvalRecord, Record
from dop_search.divergence.profiling import Profile
from dop_search.evaluation.scores import SuiteScores
from dop_search.search import EvaluationStore
from dop_search.strategy import Strategy
from dop_search.strategy.cost import LatencyTable
from dop_search.utils.errors import CacheError, ConfigError, DopError
from dop_search.utils.versioned import Format, write_json

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "strategy": ("strategy.json", lambda path: Strategy.load(path)),
    "record": ("record.json", lambda path: Record.load(path)),
    "evaluation": ("scores.json", lambda path: EvalRecord.load(path)),
    "suite scores": ("scores.json", lambda path: SuiteScores.load(path.parent)),
    "profile": ("profile.json", lambda path: Profile.load(path.parent)),
    "latency table": ("table.json", lambda path: LatencyTable.load(path)),
    "evaluations": ("kl.jsonl", lambda path: EvaluationStore(lambda *args: args[0], 2, path)),
}


@pytest.fixture(params=READERS, ids=str)
def reader(request: pytest.FixtureRequest) -> tuple[str, Callable[[Path], Any]]:
    return READERS[request.param]


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(DopError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "; " in message, "the remedy is said"
    return message


def test_another_format_and_another_version_are_named(reader, tmp_path: Path) -> None:
    name, read = reader
    path = tmp_path / name
    path.write_text(json.dumps({"format": "something.else", "version": 1}) + "\n")
    found = refusal(read, path)
    assert "its format is 'something.else'" in found
    assert "of version 1" in found
    assert "but this dop-search reads" in found
    path.write_text("[1, 2]\n")
    assert "it holds [1, 2], not an object" in refusal(read, path)


def test_what_is_no_json_is_said(reader, tmp_path: Path) -> None:
    name, read = reader
    path = tmp_path / name
    path.write_text("not JSON at all\n")
    assert "is not a" in refusal(read, path)


def test_a_missing_file_is_named(reader, tmp_path: Path) -> None:
    name, read = reader
    if name != "kl.jsonl":  # which is made
        assert "there is no" in refusal(read, tmp_path / name)


def test_a_format_reads_what_it_stamped_and_raises_its_own_error(tmp_path: Path) -> None:
    kind = Format("a thing", "tests.thing", 3, "make it again", error=ConfigError)
    path = tmp_path / "folder" / "thing.json"
    write_json(path, {**kind.stamp, "value": "ä"}, ensure_ascii=False)
    assert kind.read(path) == {"format": "tests.thing", "version": 3, "value": "ä"}
    assert path.read_text(encoding="utf-8").endswith('"value": "ä"\n}\n')
    write_json(path, {**kind.stamp, "version": 2})
    with pytest.raises(ConfigError, match=r"is not a thing of version 3: its version is 2, .* reads 3; make it again"):
        kind.read(path)
    with pytest.raises(CacheError, match="cannot read a file"):
        Format("a file", "x", 1, "give a file").read(tmp_path)

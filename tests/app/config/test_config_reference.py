"""The committed reference is what the code says, and says something about every key."""

from __future__ import annotations

import dataclasses

import pytest

from dop_search.app.config import SearchConfig
from dop_search.app.config.reference import FILE, reference
from dop_search.app.config.schema import EvalRunConfig
from dop_search.app.study import find_study, study_names
from dop_search.data.sources import DatasetSource, TaskSource
from dop_search.utils.conf import config_dir


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """Key → type, default, meaning of the table below a heading."""
    block = text.partition(f"\n{heading}\n")[2].partition("\n#")[0]
    cells = [line.strip("|").split(" | ") for line in block.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


def test_the_committed_file_is_up_to_date() -> None:
    committed = (config_dir() / FILE).read_text(encoding="utf-8")
    assert committed == reference(), "run `python -m dop_search.app.config.reference`"


def test_every_key_of_every_section_is_there_with_its_meaning() -> None:
    text = reference()
    expected = {"## Keys of `dop-search`": list(SearchConfig.model_fields)}
    expected["## Keys of `dop-eval`"] = list(EvalRunConfig.model_fields)
    for kind, source in (("task", TaskSource), ("dataset", DatasetSource)):
        expected[f"### `data.sources[] (kind={kind})`"] = [field.name for field in dataclasses.fields(source)]
    expected["### `tracking`"] = list(type(SearchConfig().tracking).model_fields)
    expected["### `search (solver=exact_optuna)`"] = ["solver", "sampler", "num_trials", "num_warm_start", "pruner"]
    for name in study_names():
        expected[f"### `study.options` (study.name={name})"] = list(find_study(name).model_fields)
    for heading, keys in expected.items():
        found = rows(text, heading)
        assert list(found)[: len(keys)] == keys
        assert all(row[2] for row in found.values()), f"{heading}: a key without a docstring"


@pytest.mark.parametrize(
    ("heading", "key", "row"),
    [
        ("### `data`", "num_samples", ["integer > 0", "`96`"]),
        ("### `data`", "path", ["string or `null`", "`null`"]),
        ("### `model`", "dtype", ["`auto`, `float32`, `bfloat16`, `float16`", "`auto`"]),
        ("### `data.sources[] (kind=task)`", "split", ["string", "required"]),
        ("### `space`", "shares", ["list of numbers", "`[1.0]`"]),
        ("## Keys of `dop-search`", "model", ["section", ""]),
        ("### `study.options` (study.name=selectors)", "space", ["`dop`, `dop_split`, `dop_groups`", "`dop_split`"]),
    ],
)
def test_types_and_defaults(heading: str, key: str, row: list[str]) -> None:
    assert rows(reference(), heading)[key][:2] == row


def test_every_option_of_every_group_is_there() -> None:
    text = reference()
    for path in config_dir().glob("*/**/*.yaml"):
        line = next(line for line in text.splitlines() if line.startswith((f"| `{path.stem}`", f"| **`{path.stem}`**")))
        assert len(line.split("|")[2].strip()) > 5
    assert "**`joint`**" in text
    assert all(f"| {launcher} | " in text for launcher in ("**`basic`**", "`joblib`"))

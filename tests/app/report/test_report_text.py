"""What tables say about a strategy and a result."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from support.records import example_record

from dop_search.app.record import Record
from dop_search.app.report.table import summary
from dop_search.app.report.text import interval_text, kl_text, notes, percent_text, policy_text, verdict
from dop_search.strategy import Strategy


def rendered(record: Record, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(summary(record))
    return stream.getvalue().splitlines()


def test_split_attention_shows_both_depths() -> None:
    text = policy_text(Strategy.depthwise(12, q=3, kv=9, mlp=6, num_visual_tokens=72))
    assert text == {"D_A": "3/9", "D_A_ratio": "0.25/0.75", "D_P": "6", "D_P_ratio": "0.50", "n_v": "72"}


def test_tied_attention_reads_the_same_with_and_without_its_dead_query() -> None:
    tied = Strategy.depthwise(12, q=8, kv=8, mlp=4)
    assert tied.canonical() != tied
    assert policy_text(tied) == policy_text(tied.canonical())
    assert policy_text(tied)["D_A"] == "8"
    assert policy_text(Strategy.full(12).canonical())["D_A"] == "12"


def test_groups_and_free_layer_sets() -> None:
    groups = Strategy.depthwise(12, q=[8, 2], kv=[9, 4], mlp=[4, 1], shares=[0.25, 0.75])
    assert policy_text(groups)["D_A"] == "9,2/4"
    runs = np.ones((1, 12, 3), dtype=bool)
    runs[0, 3, 1] = False
    free = policy_text(Strategy.from_array(runs))
    assert (free["D_A"], free["D_A_ratio"], free["D_P"]) == ("12/{11}", "1.00/–", "12")


def test_numbers() -> None:
    assert [kl_text(x) for x in (None, 0.0, 0.01234, 0.000081)] == ["–", "0", "0.0123", "8.1e-05"]
    assert interval_text((0.01, 0.015)) == "0.0100…0.0150"
    assert percent_text(0.9512) == "95.1"


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((-0.02, -0.01), "better"), ((0.01, 0.02), "worse"), ((-0.01, 0.01), "no difference"), (None, "lower, untested")],
)
def test_verdict_follows_the_paired_interval(interval: tuple[float, float] | None, expected: str) -> None:
    result = example_record().results[0].model_copy(update={"kl_heldout_difference_ci95": interval})
    assert verdict(result) == expected


@pytest.mark.parametrize(("p", "said"), [(0.0004, "better"), (0.031, "better"), (0.2, "no difference")])
def test_with_a_p_value_the_test_decides_not_the_interval(p: float, said: str) -> None:
    results = [item.model_copy(update={"kl_heldout_difference_p": p}) for item in example_record().results]
    (line,) = (line for line in notes(example_record().model_copy(update={"results": results})) if "sign flips" in line)
    shown = {0.0004: "(p < .001)", 0.031: "(p = .031)", 0.2: "(p = .2)"}[p]
    assert line.split(": ", 1)[1] == ", ".join(f"{said} at {item.budget.text} {shown}" for item in results) + "."


def test_the_table_fits_80_columns_uncut_and_says_it_all() -> None:
    record = example_record()
    lines = rendered(record, 80)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    wide = [line.rstrip() for line in rendered(record, 200)]
    end = wide.index(next(line for line in wide if line.startswith("pocket on")))
    assert [line.rstrip() for line in lines[:end]] == wide[:end]  # no cell is cut off
    for result in record.results:
        assert kl_text(result.kl_heldout) in text
        assert interval_text(result.kl_heldout_ci95) in text
        assert result.uniform is not None
        assert interval_text(result.uniform.kl_heldout_ci95) in text
        assert percent_text(result.accuracy_pruned) in text
    assert "95.1 %" in text  # the full model


def test_a_mean_that_few_samples_carry_is_called_uncertain() -> None:
    record = example_record()
    first, *others = record.results
    for count, expected in ((2, "interval is uncertain: 2 at"), (40, "")):
        said = "\n".join(
            notes(record.model_copy(update={"results": [first.model_copy(update={"num_dominant": count}), *others]}))
        )
        assert ("uncertain" in said) == bool(expected)
        assert expected in said


def test_nothing_measured_is_a_dash_not_a_number() -> None:
    record = example_record()
    bare = record.results[0].model_copy(update={"accuracy_full": None, "accuracy_pruned": None, "uniform": None})
    record = record.model_copy(update={"results": [bare], "floor_ratio": None})
    assert not any("Accuracy" in note or "text tokens" in note for note in notes(record))
    assert any("–" in line for line in rendered(record, 80))

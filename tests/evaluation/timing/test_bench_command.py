"""``dop-bench``: equal FLOPs, verdicts, JSON, and that it runs on a machine with torch and transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from dop_search.app.cli.bench import main
from dop_search.evaluation.timing.comparison import Comparison, Row, compare
from dop_search.evaluation.timing.counting import count_decoder_flops
from dop_search.evaluation.timing.shapes import SHAPES, build, prompt
from dop_search.evaluation.timing.text import comparison_text
from dop_search.evaluation.timing.timing import Reading, read_generation
from dop_search.evaluation.timing.variants import Prompt, Variant, make_variants, nearest
from dop_search.models.families import adapter_for
from dop_search.pruning import pruned
from dop_search.strategy import Strategy
from dop_search.strategy.cost import CostModel, layer_flops
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.utils.statistics import paired_ratio, spread

BARE = """
import sys
from importlib.machinery import PathFinder

absent, find = {"pydantic", "hydra", "omegaconf", "mlflow", "optuna", "pandas", "scipy", "rich"}, PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in absent else find(name, *rest))

from dop_search.app.cli.bench import main
status = main(sys.argv[1:])
assert not absent & {name.split(".")[0] for name in sys.modules}
sys.exit(status)
"""
"""The command where only what a pruned model needs is installed."""


@pytest.mark.slow
def test_on_a_bare_machine_it_times_everything_and_says_what(tmp_path: Path) -> None:
    strategy = tmp_path / "mine.json"
    Strategy.depthwise(4, 2, 3, 1, num_visual_tokens=50, selector="uniform_grid").save(strategy)
    out = tmp_path / "out.json"
    arguments = ["--shape", "tiny", "--text-tokens", "12", "--ratio", "0.6", "--strategy", str(strategy)]
    arguments += ["--rounds", "2", "--tokens", "3", "--num-threads", "1", "--quiet", "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", BARE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    assert data["environment"]["attn_implementation"] == "sdpa"
    assert (data["text_tokens"], data["visual_tokens"], data["generated_tokens"]) == (12, 200, 3)
    rows = {row["name"]: row for row in data["rows"]}
    expected = {"full model", "empty strategy", "mine", "reduced before the decoder", "hooks at layer 2"}
    assert set(rows) == expected | {"uniform", "tied", "split"}
    for row in rows.values():
        assert len(row["readings"]) == 2
        if row["target_ratio"] is not None:
            assert row["flops_ratio"] == pytest.approx(0.6, rel=0.01)
        for reading in row["readings"]:
            parts = reading["vision_ms"] + reading["prefill_ms"]
            assert 0 < parts <= reading["first_token_ms"] < reading["end_to_end_ms"]
            assert reading["peak_bytes"] is None
    # float32 keys and values of 4 layers: every token in the full model, 50 + 12 in the first three of `mine`
    assert rows["full model"]["readings"][0]["kv_bytes"] == 4 * 212 * 2 * 64 * 4
    assert rows["mine"]["readings"][0]["kv_bytes"] == (3 * 62 + 12) * 2 * 64 * 4
    for text in ("attention backend sdpa", "mine", "0.6 split", "n/a", "Aim: time <= 1.10 x FLOPs + 0.02"):
        assert text in done.stdout


def test_flops_of_the_baselines_are_counted_ones() -> None:
    shape = SHAPES["tiny"]
    model = build(shape, torch.device("cpu"), torch.float32, "eager")
    adapter = adapter_for(model)
    given = Prompt.of(adapter, prompt(shape, model, 12))
    variants, missing = make_variants(model, adapter, given, {}, [0.6])
    full = count_decoder_flops(model, given.inputs)
    assert not missing
    assert len(variants) == 7
    for variant in variants:
        if variant.kind == "empty":
            continue
        with variant.enter():
            counted = count_decoder_flops(model, given.inputs) / full
        assert counted == pytest.approx(variant.flops_ratio, abs=1e-12), variant.name


def test_what_cannot_reach_its_flops_is_said() -> None:
    shape = SHAPES["tiny"]
    model = build(shape, torch.device("cpu"), torch.float32)
    adapter = adapter_for(model)
    given = Prompt.of(adapter, prompt(shape, model, 12))
    variants, missing = make_variants(model, adapter, given, {}, [0.3, 0.01], depths=["uniform"])
    assert [variant.name for variant in variants[2:]] == ["reduced before the decoder", "uniform"]
    assert len(missing) == 4
    assert any(
        line.startswith("hooks at layer 2 at 0.3: the layers before it and the text cost 0.5") for line in missing
    )
    floor = CostModel(adapter.dims, [given.counts]).floor_ratio
    assert f"uniform at 0.01: the text alone costs {floor:.3f} of the FLOPs" in missing


@pytest.mark.parametrize("ratio", [0.0, 0.13, 0.5, 0.77, 1.0])
def test_nearest_number_of_tokens_by_brute_force(ratio: float) -> None:
    dims = ModelDims(3, 32, 64, 4, 4, 8)
    counts = TokenCounts(5, 40)
    cost = CostModel(dims, [counts])

    def ratio_of(tokens: int) -> float:
        return cost.ratio(Strategy.full(3, num_visual_tokens=tokens))

    best = min(range(41), key=lambda tokens: abs(ratio_of(tokens) - ratio))
    assert abs(ratio_of(nearest(ratio_of, ratio, 40)) - ratio) == abs(ratio_of(best) - ratio)
    assert layer_flops(dims, 1, 1, 1) > 0


def reading(prefill: float) -> Reading:
    return Reading(1.0, prefill, 2.0, prefill + 1, prefill + 9, None, 2**20)


def test_verdicts_compare_the_median_paired_ratio_with_the_aim() -> None:
    strategy = Strategy.full(4, num_visual_tokens=5)
    full = Row(Variant("full model", "full", 1.0, nullcontext), tuple(map(reading, (100.0, 200.0, 400.0))))
    ours = Variant("uniform", "strategy", 0.3, nullcontext, 0.3, strategy)
    # 1.10 * 0.3 + 0.02 = 0.35; paired ratios 0.3, 0.349, 0.9 although the unpaired medians say 0.349
    good = Row(ours, tuple(map(reading, (30.0, 69.8, 360.0))))
    bad = Row(ours, tuple(map(reading, (35.2, 70.4, 40.0))))
    empty = Row(Variant("empty strategy", "empty", 1.0, nullcontext, None, strategy), full.readings)
    assert good.ratio(full, "prefill_ms").median == pytest.approx(0.349)  # type: ignore[union-attr]
    assert (good.passes(full), bad.passes(full), empty.passes(full), full.passes(full)) == (True, False, True, None)
    facts = {"device": "cpu", "num_threads": 1, "dtype": "float32", "attn_implementation": "sdpa", "versions": {}}
    comparison = Comparison(
        "made up", {**facts, "clock": "wall"}, TokenCounts(1, 9), 2, (full, empty, good, bad), ("a note",)
    )
    lines = comparison_text(comparison).splitlines()
    verdicts = [word for line in lines for word in line.split() if word in ("pass", "FAIL")]
    assert verdicts == ["pass", "pass", "FAIL"]
    assert "a note" in lines[-1]
    assert [row["passes"] for row in comparison.to_json()["rows"]] == [None, True, True, False]


def test_spread_is_the_median_and_covers_it() -> None:
    values = np.random.default_rng(1).lognormal(size=41)
    found = spread(values.tolist())
    assert found.median == np.median(values)
    assert found.ci95[0] < found.median < found.ci95[1]
    assert found.quartiles == tuple(np.percentile(values, [25, 75]))
    assert paired_ratio((3 * values).tolist(), values.tolist()).ci95 == pytest.approx((3.0, 3.0))


def test_rounds_are_interleaved_and_the_warmup_does_not_count() -> None:
    shape = SHAPES["tiny"]
    model = build(shape, torch.device("cpu"), torch.float32)
    inputs = prompt(shape, model, 6)
    visits: list[str] = []

    def variant(name: str) -> Variant:
        return Variant(name, "full", 1.0, lambda: visits.append(name) or nullcontext())  # type: ignore[func-returns-value]

    rows = compare(
        model, adapter_for(model), inputs, [variant("a"), variant("b")], rounds=3, warmup=1, passes=1, num_tokens=1
    )
    assert [len(row.readings) for row in rows] == [3, 3]
    assert all(sorted(visits[i : i + 2]) == ["a", "b"] for i in range(0, 8, 2))
    assert rows[0].readings[0].decode_ms is None


def test_reading_leaves_the_model_as_it_was() -> None:
    from dop_search.testing.measure import model_state, state_difference

    shape = SHAPES["tiny"]
    model = build(shape, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model(**prompt(shape, model, 6))  # on its first call transformers installs hooks of its own
    before = model_state(model)
    with pruned(model, Strategy.depthwise(4, 1, 2, 1, selector="uniform_grid")):
        first = read_generation(model, adapter_for(model), prompt(shape, model, 6), 2)
    assert not state_difference(before, model_state(model))
    assert first.decode_ms is not None
    assert first.decode_ms > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "1.5"], "`0 < ratio <= 1` must hold, but got --ratio 1.5"),
        (["--rounds", "0"], "`--rounds >= 1` must hold, but got 0"),
        (["--shape", "tiny", "--weights", "pretrained"], "a --shape has no pretrained weights"),
        (["--shape", "tiny", "--strategy", "nowhere.json"], "there is no strategy at 'nowhere.json'"),
        (["--shape", "tiny", "--device", "gpu"], "`--device` must be auto, cpu or cuda[:index], but got 'gpu'"),
        (["--model", "./nowhere", "--weights", "random"], "cannot load './nowhere'"),
        (["--shape", "tiny", "--table", "t.json"], "--table needs --validate-table"),
        (["--shape", "tiny", "--text-tokens", "1"], "`text_tokens >= 2` must hold"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_needs_no_weights_to_be_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dop_search.models.pocket import pocket_path

    for file in pocket_path().iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    arguments = [
        "--model",
        str(tmp_path),
        "--weights",
        "random",
        "--ratio",
        "--rounds",
        "1",
        "--tokens",
        "1",
        "--quiet",
    ]
    assert main([*arguments, "--warmup", "0"]) == 0
    output = capsys.readouterr().out
    assert "random weights" in output
    assert "256 visual tokens" in output


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    for text in ("llava_next_7b", "--validate-table", "python -m dop_search.app.cli.bench", "FLOPs ratios"):
        assert text in output

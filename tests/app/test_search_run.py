"""The whole line on the bundled model: what a run leaves behind, and that a killed one continues."""

import json
import re
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from PIL import Image
from support.forked import forked
from support.pictures import save_nothing

from dop_search.app.config import SearchConfig
from dop_search.app.record import Record
from dop_search.app.search import run
from dop_search.search.optuna_study import open_storage
from dop_search.strategy import Strategy
from dop_search.utils.errors import BudgetError, CacheError, DopError
from dop_search.utils.progress import Progress

SMALL = {
    "data": {"num_samples": 6, "num_heldout": 6, "num_test": 6},
    "space": {"num_depth_levels": 3, "num_token_levels": 3},
    "search": {"solver": "additive_exact", "num_rerank": 3},
    "tracking": {"backend": "none"},
}


def small(tmp_path, **changes):
    return SearchConfig.model_validate({**SMALL, "budget": [0.3], "cache_dir": str(tmp_path / "cache"), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", save_nothing)
        record = run(small(path, budget=[0.5, 0.25]), path / "out", Progress())
    return path, record


@pytest.mark.slow
def test_leaves_record_strategies_curves_and_pictures(finished):
    path, record = finished
    names = {str(file.relative_to(path / "out")) for file in (path / "out").rglob("*") if file.is_file()}
    assert {"record.json", "curves.parquet", "strategy-0.5.json", "strategy-0.25.json", "report.html"} <= names
    assert {f"plots/{name}.{kind}" for name in ("layer_map", "pareto_front") for kind in ("png", "pdf")} <= names
    assert Record.load(path / "out") == record
    assert not [name for name in names if name.startswith(".")], "no temporary file is left"


def test_record_keeps_its_contract(finished):
    path, record = finished
    data = json.loads((path / "out" / "record.json").read_text())
    assert {"format", "version", "model", "data", "selector", "space", "solver", "results"} <= set(data)
    fields = {
        *("budget", "strategy", "flops_ratio", "kv_ratio", "kl_additive", "kl_search", "kl_heldout"),
        *("kl_heldout_ci95", "accuracy_full", "accuracy_pruned", "uniform", "num_validation_runs", "seconds"),
    }
    for result in data["results"]:
        assert fields <= set(result)
        assert {"num_visual_tokens", "flops_ratio", "kl_heldout", "accuracy"} <= set(result["uniform"])
    for result, budget in zip(record.results, (0.5, 0.25), strict=True):
        assert result.flops_ratio <= budget
        assert result.uniform.flops_ratio <= budget
        assert Strategy.load(path / "out" / f"strategy-{budget:g}.json") == result.strategy
        low, high = result.kl_heldout_ci95
        assert low <= result.kl_heldout <= high
        assert result.kl_search <= min(item.kl_search for item in result.candidates), "the best candidate is chosen"
        assert any(item.is_uniform for item in result.candidates), "uniform reduction is among the candidates"


def test_found_strategy_is_what_the_engine_scores(finished, pocket):
    """The record's held-out KL again, from the saved strategy and plain pruned forwards of whole samples."""
    import torch

    from dop_search.data.validation import validation_set
    from dop_search.models.prompts import model_inputs
    from dop_search.pruning import pruned

    path, record = finished
    result = record.results[1]
    strategy = Strategy.load(path / "out" / "strategy-0.25.json")
    values = []
    for sample in validation_set("pocket", 6, split="heldout"):
        inputs = model_inputs(pocket.processor, [sample], torch.device("cpu"))
        start = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            ids = pocket.model.generate(**inputs, max_new_tokens=16, do_sample=False)
            forced = {**inputs, "input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
            full = pocket.model(**forced).logits[0, start - 1 :].double().log_softmax(dim=-1)
            with pruned(pocket.model, strategy):
                ours = pocket.model(**forced).logits[0, start - 1 :].double().log_softmax(dim=-1)
        values.append((full.exp() * (full - ours)).sum(dim=-1).mean().item())
    assert np.mean(values) == pytest.approx(result.kl_heldout, rel=1e-2, abs=1e-4)


@pytest.mark.slow
def test_same_command_again_repeats_no_validation_run(finished, monkeypatch):
    from dop_search.divergence import DivergenceEngine

    path, record = finished

    def forbidden(*args, **kwargs):
        raise AssertionError("a validation run was repeated")

    monkeypatch.setattr(DivergenceEngine, "evaluate", forbidden)
    monkeypatch.setattr(DivergenceEngine, "__call__", forbidden)
    again = run(small(path, budget=[0.5, 0.25]), path / "again", Progress())
    assert [item.kl_heldout for item in again.results] == [item.kl_heldout for item in record.results]
    assert again.num_validation_runs == record.num_validation_runs


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_the_same(finished, tmp_path):
    """``kill -9`` while the curves are measured; the next run starts from what was saved."""
    _, record = finished
    config = small(tmp_path, budget=[0.5, 0.25])
    process = forked(run, config, tmp_path / "out", Progress())
    cache = tmp_path / "cache"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if any(len(file.read_text().splitlines()) > 1 for file in cache.glob("evaluations-*.jsonl")):
            break
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (tmp_path / "out" / "record.json").exists(), "killed before the end"
    again = run(config, tmp_path / "out", Progress())
    for ours, theirs in zip(again.results, record.results, strict=True):
        assert ours.strategy == theirs.strategy
        assert ours.kl_heldout == pytest.approx(theirs.kl_heldout, rel=1e-3)
    assert again.num_validation_runs == record.num_validation_runs


def test_an_infeasible_budget_names_the_smallest_feasible(finished, tmp_path):
    path, _ = finished
    with pytest.raises(BudgetError, match=r"0\.01.*smallest") as caught:
        run(small(path, budget=[0.01]), tmp_path / "out", Progress())
    assert 0.01 < caught.value.smallest_feasible < 0.3
    assert not list((tmp_path / "out").iterdir()), "nothing half-written"


@pytest.mark.slow
def test_a_corrupt_cache_is_named(finished, tmp_path):
    path, _ = finished
    for file in (path / "cache").glob("evaluations-*.jsonl"):
        copy = tmp_path / "cache" / file.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text("garbage\n" + file.read_text())
    with pytest.raises(CacheError, match=r"evaluations-.*not an evaluation file.*delete that file"):
        run(small(tmp_path), tmp_path / "out", Progress())


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        {"solver": "additive_optuna", "sampler": "random", "num_trials": 40, "num_rerank": 2},
        {"solver": "exact_optuna", "sampler": "random", "num_trials": 6, "num_warm_start": 3, "pruner": "none"},
        {"solver": "exhaustive", "num_levels": 2},
    ],
    ids=lambda search: search["solver"],
)
def test_every_solver_runs_through_the_pipeline(finished, tmp_path, search):
    path, _ = finished
    record = run(small(path, budget=[0.5], search=search, eval={"name": "none"}), tmp_path, Progress())
    (result,) = record.results
    assert result.flops_ratio <= 0.5
    assert result.kl_search <= result.uniform.kl_search + 1e-9, "never worse than uniform reduction on the search set"
    if search["solver"] == "exact_optuna":
        (journal,) = path.glob("cache/study-*[0-9a-f].journal")
        (name,) = optuna.get_all_study_names(open_storage(journal))
        assert re.fullmatch(r"pocket-dop_split-random-flops0\.5-[0-9a-f]{8}", name)


@pytest.mark.slow
def test_one_study_chooses_selector_and_space_and_is_kept(tmp_path):
    """Trials of every pair, uniform reduction by the selector that was found; the journal is Optuna's."""
    import optuna

    from dop_search.search.optuna_study import open_storage

    selectors, spaces = ["cls_attention", "divprune"], ["dop_split", "gsop"]
    choice = {"selector": {"name": selectors[0], "also": selectors}, "space": {**SMALL["space"], "also": spaces}}
    search = {"solver": "joint", "num_proposals": 8, "num_sampled": 4, "num_finalists": 3}
    data = {"num_samples": 3, "num_decision": 3, "num_heldout": 3, "num_test": 0}
    config = small(tmp_path, search=search, data=data, **choice)
    record = run(config, tmp_path / "out", Progress())
    (result,) = record.results
    assert result.flops_ratio <= 0.3
    finalists = result.candidates[:3]
    assert sorted(item.kl_search for item in finalists) == sorted(item.kl_search for item in result.candidates)[:3]
    assert result.kl_search == finalists[0].kl_search
    assert finalists[0].kl_decision == min(item.kl_decision for item in finalists)
    ids = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert len({sample for split in ("search", "decision", "heldout") for sample in ids[split]["ids"]}) == 9
    assert result.uniform_strategy.selector == result.strategy.selector
    assert result.uniform.flops_ratio <= 0.3
    (file,) = (file for file in (tmp_path / "cache").glob("study-*-joint-*.journal") if "bookkeeping" not in file.name)
    storage = open_storage(file)
    (name,) = (name for name in optuna.get_all_study_names(storage) if "-joint-tpe-flops0.3-" in name)
    study = optuna.load_study(study_name=name, storage=storage)
    pairs = {(trial.params["selector"], trial.params["space"]) for trial in study.trials}
    assert pairs == {(selector, space) for selector in selectors for space in spaces}
    warm = [trial for trial in study.trials if "warm_start" in trial.user_attrs]
    assert len(study.trials) == len(warm) + 4
    fits = [trial for trial in study.trials if trial.user_attrs["candidate"]["fits"]]
    measured = [trial.value for trial in fits if trial.state.name == "COMPLETE"]
    assert min(item.kl_search for item in finalists) == pytest.approx(min(measured))


@pytest.mark.slow
def test_kv_budget_and_groups(finished, tmp_path):
    path, _ = finished
    space = {"name": "dop_groups", "shares": [0.25, 0.75], "num_depth_levels": 2, "num_token_levels": 3}
    record = run(small(path, budget=[{"kv_ratio": 0.4}], space=space, eval={"name": "none"}), tmp_path, Progress())
    assert record.results[0].kv_ratio <= 0.4
    assert len(record.results[0].strategy.groups) == 2
    assert Path(tmp_path / "strategy-KV-0.4.json").exists()


def made_up_table(model, counts, **options):
    """Layer times that nobody measured: 1 ms a layer of text, 1 ms more for each module of all visual tokens."""
    from dop_search.evaluation.timing.comparison import environment
    from dop_search.evaluation.timing.layer_times import grids
    from dop_search.models.families import adapter_for
    from dop_search.strategy.cost import LatencyTable

    text, visual, lengths = grids(counts)
    rising = np.tile(np.array(visual) / visual[-1], (len(text), 1))
    empty = np.zeros((*rising.shape, 0))
    adapter = adapter_for(model)
    return LatencyTable(
        environment=environment(model, adapter, options["clock"]),
        num_layers=adapter.dims.num_layers,
        text=text,
        visual=visual,
        shares=(),
        keys_ms=1.0 + rising,
        queries_ms=rising,
        mlp_ms=rising,
        queries_part_ms=empty,
        mlp_part_ms=empty,
        lengths=lengths,
        fixed_ms=np.full(len(lengths), 0.5),
        full_ms=np.full(len(lengths), 4.0 * adapter.dims.num_layers),
    )


@pytest.mark.slow
def test_a_latency_budget_is_kept_by_the_layer_times_which_are_measured_once(tmp_path, monkeypatch):
    from dop_search.evaluation.timing import layer_times

    calls = []
    monkeypatch.setattr(
        layer_times,
        "measure_table",
        lambda model, counts, **rest: calls.append(1) or made_up_table(model, counts, **rest),
    )
    data = {"num_samples": 3, "num_heldout": 3, "num_test": 0}
    changes = {"space": {"name": "dop", **SMALL["space"]}, "eval": {"name": "none"}, "data": data}
    config = small(tmp_path, budget=[{"latency_ratio": 0.6}, {"latency_ms": 24.0}], **changes)
    record = run(config, tmp_path / "out", Progress())
    for result in record.results:
        depths = {name: values[0] for name, values in result.strategy.depths().items()}
        visual = result.strategy.num_kept(256) / 256
        expected_ms = 0.5 + 12 + visual * sum(depths.values())
        assert result.latency_ms == pytest.approx(expected_ms, abs=0.2)  # the grid's tokens are rounded
        assert result.latency_ratio == pytest.approx(result.latency_ms / 48)
        assert result.uniform is None or result.uniform.latency_ratio <= 0.6
        assert 0 < result.flops_ratio < 1
    assert record.results[0].latency_ratio <= 0.6
    assert record.results[1].latency_ms <= 24.0
    assert record.results[0].budget.text == "time 0.6"
    assert Record.load(tmp_path / "out") == record
    again = run(config, tmp_path / "again", Progress())
    assert [result.strategy for result in again.results] == [result.strategy for result in record.results]
    assert len(calls) == 1


def own_file(path, num_lines, answer=True):
    """A JSONL file with an image per line."""
    lines = []
    for index in range(num_lines):
        Image.new("RGB", (40, 40), (9 * index, 0, 0)).save(path / f"{index}.png")
        lines.append({"image": f"{index}.png", "question": "What is it?", **({"answer": "red"} if answer else {})})
    (path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {"name": "jsonl", "path": str(path / "mine.jsonl"), "num_samples": 2, "num_heldout": 2, "num_test": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selector": {"name": "cls_atention"}}, "unknown selector 'cls_atention'.*did you mean 'cls_attention'"),
        ({"selector": {"name": "random", "options": {"sed": 1}}}, r"no option \['sed'\]"),
        ({"data": {"name": "poket"}}, "unknown validation set 'poket'"),
        ({"data": {"name": "jsonl", "path": "absent.jsonl"}}, "no validation file at 'absent.jsonl'"),
        ({"num_heldout": 4}, r"6 different images.*search 2 of 2, heldout 2 of 4 .*11 lines .*lower data\.num_heldout"),
        ({"num_test": 1}, r"line \d has no answer.*data\.num_test=0"),
        ({"answers": "ground_truth"}, r"line \d has no answer.*data\.answers=teacher"),
    ],
)
def test_what_cannot_be_had_is_an_error_before_a_model_is_loaded(tmp_path, monkeypatch, changes, message):
    def forbidden(**kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dop_search.app.begin.load", forbidden)
    if not {"selector", "data"} & set(changes):
        changes = {"data": {**own_file(tmp_path, 6, answer=False), **changes}}
    with pytest.raises(DopError, match=message):
        run(small(tmp_path, **changes), tmp_path / "out", Progress())


@pytest.mark.slow
def test_a_file_without_answers_is_enough_for_a_search(tmp_path):
    record = run(small(tmp_path, data=own_file(tmp_path, 6, answer=False)), tmp_path / "out", Progress())
    assert (record.data.num_samples, record.data.num_heldout, record.data.num_test) == (2, 2, 0)
    assert record.results[0].accuracy_full is None

"""Scores: aggregates by hand, a bootstrap against resampling by hand, saving and comparing."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dop_search.evaluation.aggregates import AGGREGATES, SampleScore
from dop_search.evaluation.scores import (
    BenchmarkScore,
    SuiteScores,
    difference_ci95,
    fingerprint,
    relative,
    relative_mean,
)
from dop_search.utils.errors import CacheError, DopError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def _samples(values, keys=None, predictions=None, targets=None):
    n = len(values)
    return tuple(
        SampleScore(
            i,
            "x" if predictions is None else predictions[i],
            ("x",) if targets is None else (targets[i],),
            float(values[i]),
            () if keys is None else keys[i],
        )
        for i in range(n)
    )


def _score(aggregate, values, **kwargs):
    return BenchmarkScore.of("b", "%", aggregate, _samples(values, **kwargs))


def test_means_have_the_usual_scale():
    assert _score("mean", [1, 0, 0.3, 1]).score == pytest.approx(57.5)
    assert _score("mean_of_1000", [1, 0, 0, 0]).score == 250.0


def test_f1_of_yes_counts_an_answer_that_is_neither_as_pope_does():
    """Precision 2/3 (three said yes), recall 2/3: the "maybe" is neither a hit nor, as in POPE's code, a miss."""
    said, truth = ["yes", "Yes", "yes", "no", "maybe", "no"], ["yes", "yes", "no", "yes", "yes", "no"]
    values = [float(a.lower() == b) for a, b in zip(said, truth, strict=True)]
    assert _score("yes_f1", values, predictions=said, targets=truth).score == pytest.approx(100 * 2 / 3)
    assert _score("yes_f1", [1.0], predictions=["no"], targets=["no"]).score == 0.0


def test_mme_adds_accuracy_and_pair_accuracy_per_category():
    """count: pairs (2 right, 1 right) → acc 75 + acc+ 50; OCR: one pair, none right → 0."""
    keys = [("count", "a"), ("count", "a"), ("count", "b"), ("count", "b"), ("OCR", "a"), ("OCR", "a")]
    assert _score("mme", [1, 1, 1, 0, 0, 0], keys=keys).score == pytest.approx(125.0)
    with pytest.raises(DopError, match=r"pairs, but 'OCR/a' has 1"):
        _score("mme", [1, 1, 1, 0, 0], keys=keys[:5])


def test_circular_counts_a_question_once_and_only_if_every_rotation_is_right():
    keys = [("1",), ("2",), ("2000001",), ("3",)]
    assert _score("circular", [1, 1, 0, 1], keys=keys).score == pytest.approx(100 * 2 / 3)


def test_hallusionbench_is_the_mean_of_three_accuracies():
    """Two figures × two questions of one set: aAcc 3/4, fAcc 1/2, qAcc 1/2."""
    keys = [("s", "f1", "q1"), ("s", "f1", "q2"), ("s", "f2", "q1"), ("s", "f2", "q2")]
    assert _score("hallusionbench", [1, 1, 1, 0], keys=keys).score == pytest.approx(100 * (0.75 + 0.5 + 0.5) / 3)


def test_category_mean_weighs_categories_alike():
    assert _score("category_mean", [1, 1, 1, 0], keys=[("a",), ("a",), ("a",), ("b",)]).score == 50.0


def test_bad_scores_are_refused():
    with pytest.raises(DopError, match="the score is given as 40"):
        dataclasses.replace(_score("mean", [1, 0]), score=40.0)
    with pytest.raises(DopError, match="needs at least one sample"):
        _score("mean", [])
    with pytest.raises(DopError, match="needs 2 keys per sample"):
        _score("mme", [1, 1])
    with pytest.raises(DopError, match=r"did you mean 'circular'"):
        AGGREGATES.find("circulr")


def _invented(aggregate, seed, num_units=60):
    """Samples of an aggregate with as many keys as it wants, in units of two."""
    rng = np.random.default_rng(seed)
    truth = ["yes" if i % 3 else "no" for i in range(2 * num_units)]
    keys = {
        0: None,
        1: [(f"{i // 2 % 20}",) for i in range(2 * num_units)],
        2: [(f"c{i // 2 % 3}", f"q{i // 2}") for i in range(2 * num_units)],
        3: [(f"s{i // 6}", f"f{i % 3}", f"q{i % 2}") for i in range(2 * num_units)],
    }[AGGREGATES[aggregate].num_keys]

    def model(accuracy):
        right = rng.random(2 * num_units) < accuracy
        said = [t if r else {"yes": "no", "no": "yes"}[t] for t, r in zip(truth, right, strict=True)]
        return _score(aggregate, right.astype(float), keys=keys, predictions=said, targets=truth)

    return model(0.6), model(0.8)


def _by_hand(pruned, full, rng):
    """One difference on one resample, by copying samples and aggregating them anew."""

    def unit(sample):
        return {
            "mme": lambda s: s.keys,
            "circular": lambda s: s.keys,
            "hallusionbench": lambda s: s.keys[:1],
        }.get(pruned.aggregate, lambda s: (str(s.doc_id),))(sample)

    def stratum(sample):
        return sample.keys[0] if pruned.aggregate in ("mme", "category_mean") else ""

    units: dict[str, dict[tuple, list[int]]] = {}
    for index, sample in enumerate(full.samples):
        units.setdefault(stratum(sample), {}).setdefault(unit(sample), []).append(index)
    rows: list[tuple[int, str]] = []
    for members in units.values():
        names = list(members)
        for copy, pick in enumerate(rng.integers(0, len(names), len(names) - 1)):
            rows += [(index, f"#{copy}") for index in members[names[pick]]]

    def rescored(side):
        copies = []
        for position, (index, copy) in enumerate(rows):
            sample = side.samples[index]
            keys = sample.keys
            if side.aggregate == "mme":
                keys = (keys[0], keys[1] + copy)
            elif side.aggregate == "circular":
                keys = (str(1000 * int(copy[1:]) + int(keys[0])),)
            elif side.aggregate == "hallusionbench":
                keys = (keys[0] + copy, *keys[1:])
            copies.append(dataclasses.replace(sample, doc_id=position, keys=keys))
        return AGGREGATES.find(side.aggregate)(copies)

    return rescored(pruned) - rescored(full)


def _with_two_more(pruned, full):
    """Each side with one unit that it alone gets right, and one that the other alone does."""
    keys = {0: [(), ()], 1: [("900",), ("901",)], 3: [("new", "f", "q"), ("newer", "f", "q")]}

    def longer(side, values):
        its = keys[AGGREGATES[side.aggregate].num_keys]
        more = [
            SampleScore(1000 + i, "yes" if value else "no", ("yes",), value, its[i]) for i, value in enumerate(values)
        ]
        return BenchmarkScore.of("b", "%", side.aggregate, (*side.samples, *more))

    return longer(pruned, (1.0, 0.0)), longer(full, (0.0, 1.0))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.fast_cases(1)
def test_bootstrap_equals_resampling_by_hand(aggregate):
    pruned, full = _invented(aggregate, seed=3)
    rng = np.random.default_rng(1)
    sides = (pruned, full) if aggregate in ("mme", "category_mean") else _with_two_more(pruned, full)
    by_hand = [_by_hand(*sides, rng) for _ in range(600)]
    low, high = difference_ci95(pruned, full, seed=0, num_resamples=4000)
    spread = np.std(by_hand)
    assert low == pytest.approx(np.quantile(by_hand, 0.025), abs=0.35 * spread)
    assert high == pytest.approx(np.quantile(by_hand, 0.975), abs=0.35 * spread)
    assert low < pruned.score - full.score < high


def test_bootstrap_is_paired_and_reproducible():
    pruned, full = _invented("mean", seed=1)
    low, high = difference_ci95(full, full)  # 120 questions without a difference do not show that there is none
    assert -4.0 < low < 0.0 < high < 4.0
    assert difference_ci95(pruned, full, seed=5) == difference_ci95(pruned, full, seed=5)
    with pytest.raises(DopError, match="the same rows on both sides"):
        difference_ci95(BenchmarkScore.of("b", "%", "mean", pruned.samples[:-1]), full)
    with pytest.raises(DopError, match="same benchmark and aggregate"):
        difference_ci95(_score("mean_of_1000", [1, 0]), _score("mean", [1, 0]))


@pytest.mark.slow
@pytest.mark.parametrize("num_questions", [50, 200])
def test_intervals_cover_95_percent_also_where_models_hardly_differ(num_questions):
    """Questions drawn from the main table's rows, of methods that differ from the full model in 1 to 46 of 50."""
    rows = json.loads((EXPERIMENTS / "main_table" / "per_sample.json").read_text())
    answers = {tuple(json.loads(key).items()): np.array(values) for key, values in rows.items()}
    full = {dict(key)["benchmark"]: values for key, values in answers.items() if dict(key)["method"] == "full"}
    pairs = [(values, full[dict(key)["benchmark"]]) for key, values in answers.items()]
    pairs = [pair for pair in pairs if not np.array_equal(*pair)]
    rng, covered = np.random.default_rng(2), {True: [], False: []}
    for ours, theirs in pairs[::2]:
        truth, few = 100.0 * (ours - theirs).mean(), (ours != theirs).sum() < 8
        for _ in range(10):
            drawn = rng.integers(0, len(ours), num_questions)
            sides = [_score("mean", side[drawn]) for side in (ours, theirs)]
            low, high = difference_ci95(*sides, num_resamples=400)
            covered[few].append(low - 1e-9 <= truth <= high + 1e-9)
    assert 0.93 <= np.mean(covered[False]) <= 0.97
    assert 0.93 <= np.mean(covered[True]) <= 0.99


def _suite(name="s", **scores):
    return SuiteScores(name, {n: BenchmarkScore.of(n, "%", "mean", _samples(v)) for n, v in scores.items()}, "m")


def test_relative_scores():
    full, pruned = _suite(gqa=[1, 1, 1, 1], pope=[1, 1, 0, 0]), _suite(gqa=[1, 1, 1, 0], pope=[1, 0, 0, 0])
    assert relative(pruned, full) == {"gqa": 75.0, "pope": 50.0}
    assert relative_mean(pruned, full) == 62.5
    assert math.isnan(relative_mean(full, _suite(gqa=[0], pope=[1])))
    with pytest.raises(DopError, match="same benchmarks only"):
        relative(pruned, _suite(gqa=[1]))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_scores_survive_the_disk(tmp_path, aggregate):
    score = dataclasses.replace(_invented(aggregate, seed=0)[0], benchmark="gqa", unit="points")
    scores = SuiteScores("s", {"gqa": score}, "pocket", "key", 40, fingerprint("a", 1))
    scores.save(tmp_path)
    assert SuiteScores.load(tmp_path) == scores


def test_a_damaged_file_is_named(tmp_path):
    _suite(gqa=[1, 0]).save(tmp_path)
    (tmp_path / "gqa.parquet").write_bytes(b"nothing")
    with pytest.raises(CacheError, match=r"'gqa'.*corrupt.*delete gqa\.json"):
        SuiteScores.load(tmp_path)
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(CacheError, match="is not a file of scores of version 1"):
        SuiteScores.load(tmp_path)


def test_fingerprints_tell_apart():
    assert len({fingerprint("a", None), fingerprint("a", 1), fingerprint("b", None)}) == 3
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_scores_need_neither_torch_nor_lmms_eval():
    code = "import sys, dop_search.evaluation.scores; print({'torch', 'lmms_eval', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

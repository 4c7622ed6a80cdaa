"""How a benchmark makes one score of many samples, in a form that can be computed again on every bootstrap resample.

An aggregate sums a few statistics over *units* (what is drawn together in a resample: a sample, an MME pair, the
rotations of one question) and combines the sums. A resample then only weights the units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dop_search.utils.errors import DopError
from dop_search.utils.registry import Registry

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class SampleScore:
    """What the model said to one question and what it was worth.

    Attributes:
        doc_id: position of the row in the benchmark's split; the same for every model.
        prediction: the answer after the task's own filters.
        targets: accepted answers; the first is canonical.
        value: what the task gives for the answer, between 0 and 1 (CIDEr: up to 10).
        keys: what the aggregate needs beside it, see :data:`AGGREGATES`.
    """

    doc_id: int
    prediction: str
    targets: tuple[str, ...]
    value: float
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Units:
    """What a bootstrap draws from, each within its stratum; names are equal for two models on the same rows."""

    names: tuple[str, ...]  # [num_units]
    strata: NDArray[np.int64]  # [num_units], indices
    statistics: FloatArray  # [num_units, num_statistics], to be summed


@dataclass(frozen=True)
class Aggregate:
    """One way to make a score of samples.

    Attributes:
        name: as it is saved.
        num_keys: how many keys each sample must have.
        units: samples → units.
        combine: sums ``[..., num_statistics]`` → scores ``[...]``, in the unit of the benchmark.
        whole_units: whether a part of a unit is worth nothing, so that a limit must keep units whole.
        right, wrong: statistics of a unit that is all right, and of one that is all wrong; empty with strata.
    """

    name: str
    num_keys: int
    units: Callable[[Sequence[SampleScore]], Units]
    combine: Callable[[FloatArray], FloatArray]
    whole_units: bool = False
    right: tuple[float, ...] = ()
    wrong: tuple[float, ...] = ()

    def __call__(self, samples: Sequence[SampleScore]) -> float:
        """The score of ``samples``; DopError without samples, or if one lacks a key."""
        return float(self.combine(self.checked_units(samples).statistics.sum(axis=0)))

    def checked_units(self, samples: Sequence[SampleScore]) -> Units:
        """The units of ``samples``, after checking them; see :meth:`__call__` for errors."""
        if not samples:
            raise DopError(f"the aggregate {self.name!r} needs at least one sample, but got none")
        for sample in samples:
            if len(sample.keys) != self.num_keys:
                raise DopError(
                    f"the aggregate {self.name!r} needs {self.num_keys} keys per sample, but sample {sample.doc_id} "
                    f"has {sample.keys}"
                )
        return self.units(samples)


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """``numerator / denominator``, and 0 where there is nothing to divide."""
    return np.asarray(np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0))


def _grouped(samples: Sequence[SampleScore], name: Callable[[SampleScore], str]) -> dict[str, list[SampleScore]]:
    groups: dict[str, list[SampleScore]] = {}
    for sample in samples:
        groups.setdefault(name(sample), []).append(sample)
    return groups


def _units(names: Sequence[str], statistics: object, strata: Sequence[int] | None = None) -> Units:
    values = np.asarray(statistics, dtype=np.float64)
    return Units(tuple(names), np.zeros(len(names), np.int64) if strata is None else np.asarray(strata), values)


def _per_sample(samples: Sequence[SampleScore]) -> Units:
    return _units([str(s.doc_id) for s in samples], [(s.value, 1.0) for s in samples])


def _mean(scale: float) -> Callable[[FloatArray], FloatArray]:
    return lambda sums: scale * _ratio(sums[..., 0], sums[..., 1])


def _yes_no(samples: Sequence[SampleScore]) -> Units:
    """True positives, said yes, is yes; anything that is not exactly "yes" or "no" counts as in POPE's own code."""
    rows = []
    for sample in samples:
        said, truth = sample.prediction.strip().lower(), sample.targets[0].strip().lower()
        missed = truth == "yes" and said == "no"
        rows.append((said == truth == "yes", said == "yes", (said == truth == "yes") or missed))
    return _units([str(s.doc_id) for s in samples], rows)


def _f1(sums: FloatArray) -> FloatArray:
    precision, recall = _ratio(sums[..., 0], sums[..., 1]), _ratio(sums[..., 0], sums[..., 2])
    return 100.0 * _ratio(2 * precision * recall, precision + recall)


def _pairs(samples: Sequence[SampleScore]) -> Units:
    """MME: a pair earns its accuracy and once more everything if both are right; one stratum per category."""
    groups = _grouped(samples, lambda s: "/".join(s.keys))
    values = []
    for name, members in groups.items():
        if len(members) != 2:
            raise DopError(f"MME is scored in pairs, but {name!r} has {len(members)} questions")
        right = sum(member.value for member in members)
        values.append(100.0 * right / 2 + 100.0 * (right == 2))
    return _stratified(list(groups), [members[0].keys[0] for members in groups.values()], values)


def _categories(samples: Sequence[SampleScore]) -> Units:
    return _stratified([str(s.doc_id) for s in samples], [s.keys[0] for s in samples], [s.value for s in samples])


def _stratified(names: Sequence[str], categories: Sequence[str], values: Sequence[float]) -> Units:
    """Per category the sum of the values and their number."""
    known = sorted(set(categories))
    strata = [known.index(category) for category in categories]
    statistics = np.zeros((len(names), 2 * len(known)))
    for row, (stratum, value) in enumerate(zip(strata, values, strict=True)):
        statistics[row, 2 * stratum : 2 * stratum + 2] = value, 1.0
    return _units(names, statistics, strata)


def _sum_of_means(sums: FloatArray) -> FloatArray:
    return np.asarray(_ratio(sums[..., 0::2], sums[..., 1::2]).sum(axis=-1))


def _mean_of_means(sums: FloatArray) -> FloatArray:
    return np.asarray(100.0 * _ratio(sums[..., 0::2], sums[..., 1::2]).mean(axis=-1))


def _all_right(samples: Sequence[SampleScore]) -> Units:
    """MMBench's circular evaluation: a question counts if it is right under every rotation of its options.

    Rotations have the question's index plus a multiple of a million.
    """
    groups = _grouped(samples, lambda s: str(int(s.keys[0]) % 1_000_000))
    return _units(list(groups), [(min(m.value for m in members), 1.0) for members in groups.values()])


def _hallusion(samples: Sequence[SampleScore]) -> Units:
    """Per set of figures and questions: right questions, right figures, right questions over all figures."""
    groups = _grouped(samples, lambda s: s.keys[0])
    rows = []
    for members in groups.values():
        row = [sum(m.value for m in members), len(members)]
        for key in (1, 2):
            worst = [min(m.value for m in part) for part in _grouped(members, lambda s, k=key: s.keys[k]).values()]  # type: ignore[misc]
            row += [sum(worst), len(worst)]
        rows.append(row)
    return _units(list(groups), rows)


_AGGREGATES = (
    Aggregate("mean", 0, _per_sample, _mean(100.0), right=(1, 1), wrong=(0, 1)),
    Aggregate("mean_of_1000", 0, _per_sample, _mean(1000.0), right=(1, 1), wrong=(0, 1)),
    Aggregate("yes_f1", 0, _yes_no, _f1, right=(1, 1, 1), wrong=(0, 0, 1)),
    Aggregate("mme", 2, _pairs, _sum_of_means, whole_units=True),
    Aggregate("circular", 1, _all_right, _mean(100.0), True, (1, 1), (0, 1)),
    Aggregate("hallusionbench", 3, _hallusion, _mean_of_means, True, (1, 1) * 3, (0, 1) * 3),
    Aggregate("category_mean", 1, _categories, _mean_of_means),
)
AGGREGATES = Registry("aggregate", {aggregate.name: aggregate for aggregate in _AGGREGATES}, DopError)
"""``mean`` (per cent; CIDEr × 100) · ``mean_of_1000`` (OCRBench: right answers per 1000) · ``yes_f1`` (POPE: F1 of yes,
per cent) · ``mme`` (keys: category, question; accuracy + accuracy of pairs, summed over categories) · ``circular``
(MMBench; key: question) · ``hallusionbench`` (keys: set, figure, question; mean of the accuracies per question, figure
and question over all figures) · ``category_mean`` (MLVU; key: category)."""

"""Full against pruned in one run: interleaved rounds, paired ratios, medians with their spread."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from dop_search.evaluation.timing.timing import Clock, OnProgress, Reading, interleaved, read_generation
from dop_search.evaluation.timing.variants import Variant
from dop_search.models.adapter import ModelAdapter
from dop_search.strategy.operations import TokenCounts
from dop_search.utils.statistics import Spread, paired_ratio, spread
from dop_search.utils.versioned import Format

FORMAT = Format("a benchmark", "dop_search.benchmark", 1, "run dop-bench again")

TIMES = ("vision_ms", "prefill_ms", "decode_ms", "first_token_ms", "end_to_end_ms")
OVERHEAD_FACTOR, OVERHEAD_OFFSET = 1.10, 0.02
"""Aim: prefill time ratio <= 1.10 x FLOPs ratio + 0.02."""
EMPTY_TOLERANCE = 0.01
"""Aim: the empty strategy runs within 1 % of the plain model."""


@dataclass(frozen=True)
class Row:
    """A variant with its measurements, one per round."""

    variant: Variant
    readings: tuple[Reading, ...]

    def values(self, metric: str) -> list[float] | None:
        """One number per round, or ``None`` if it was not measured."""
        values = [getattr(reading, metric) for reading in self.readings]
        return None if any(value is None for value in values) else [float(value) for value in values]

    def spread(self, metric: str) -> Spread | None:
        """Median and spread over the rounds."""
        values = self.values(metric)
        return None if values is None else spread(values)

    def ratio(self, full: Row, metric: str) -> Spread | None:
        """Median and spread of the ratio to the full model of the same round."""
        values, references = self.values(metric), full.values(metric)
        return None if values is None or references is None else paired_ratio(values, references)

    @property
    def prefill(self) -> Spread:
        """Median and spread of the prefill's milliseconds."""
        return spread([reading.prefill_ms for reading in self.readings])

    def prefill_ratio(self, full: Row) -> Spread:
        """Median and spread of the prefill's time relative to the full model of the same round."""
        ours, theirs = ([reading.prefill_ms for reading in row.readings] for row in (self, full))
        return paired_ratio(ours, theirs)

    @property
    def allowed_ratio(self) -> float | None:
        """The prefill time ratio that the project aims at; ``None`` for the full model."""
        if self.variant.kind == "full":
            return None
        if self.variant.kind == "empty":
            return 1.0 + EMPTY_TOLERANCE
        return OVERHEAD_FACTOR * self.variant.flops_ratio + OVERHEAD_OFFSET

    def passes(self, full: Row) -> bool | None:
        """Whether the median prefill ratio is within what is allowed."""
        return None if self.allowed_ratio is None else self.prefill_ratio(full).median <= self.allowed_ratio


@dataclass(frozen=True)
class Comparison:
    """The result of one run.

    Attributes:
        what: model or shape, in words.
        counts, num_tokens: tokens of the prompt, and generated ones.
        rows: the full model first.
        notes: what could not be compared, and why.
    """

    what: str
    environment: Mapping[str, Any]
    counts: TokenCounts
    num_tokens: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def full(self) -> Row:
        """The full model."""
        return self.rows[0]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, every measurement included."""
        return {
            **FORMAT.stamp,
            "what": self.what,
            "environment": dict(self.environment),
            "text_tokens": self.counts.text,
            "visual_tokens": self.counts.visual,
            "generated_tokens": self.num_tokens,
            "rows": [self._row_json(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        def plain(value: Spread | None) -> dict[str, Any] | None:
            return None if value is None else asdict(value)

        return {
            **row.variant.to_json(),
            "median": {metric: plain(row.spread(metric)) for metric in (*TIMES, "peak_bytes", "kv_bytes")},
            "ratio": {metric: plain(row.ratio(self.full, metric)) for metric in (*TIMES, "peak_bytes", "kv_bytes")},
            "allowed_prefill_ratio": row.allowed_ratio,
            "passes": row.passes(self.full),
            "readings": [asdict(reading) for reading in row.readings],
        }


def compare(
    model: PreTrainedModel,
    adapter: ModelAdapter,
    inputs: dict[str, Tensor],
    variants: Sequence[Variant],
    *,
    rounds: int,
    warmup: int,
    passes: int,
    num_tokens: int,
    clock: Clock = "wall",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """Time all variants in turn, in another order every round, see :func:`interleaved`.

    ``passes``: generations of ``num_tokens`` per visit of a variant, of which the last counts; 2 or more: in the steady
    state.
    """

    def measure(index: int, before: list[Reading]) -> Reading:
        with variants[index].enter():
            for _ in range(passes):
                reading = read_generation(model, adapter, inputs, num_tokens, clock)
        return reading

    names = [variant.name for variant in variants]
    readings = interleaved(measure, names, rounds=rounds, warmup=warmup, seed=seed, on_progress=on_progress)
    return [Row(variant, tuple(items)) for variant, items in zip(variants, readings, strict=True)]


def environment(model: PreTrainedModel, adapter: ModelAdapter, clock: Clock = "wall") -> dict[str, Any]:
    """What a time depends on beside the model's sizes."""
    device = adapter.device
    return {
        "device": device_name(device),
        "device_type": device.type,
        "num_threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": adapter.text_config._attn_implementation,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dims_fingerprint": adapter.fingerprint,
        "clock": clock,
    }


def device_name(device: torch.device) -> str:
    """A device by the name of its kind: the accelerator's, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"

"""What is tracked of a run, by name: parameters, metrics and tags. Plain values, no mlflow."""

from __future__ import annotations

import getpass
import hashlib
import math
import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dop_search.app.record import Provenance, Record, RelativeMean, Result, ScoreComparison, StrategyScores
from dop_search.app.report.table import markdown
from dop_search.app.report.text import policy_text
from dop_search.search.curves import Curves
from dop_search.strategy import Strategy

Point = tuple[str, float, int, int | None]
"""A metric, its value, its step, and its time in milliseconds since 1970; ``None``: now."""
FULL_STEP = 10_000
"""Step of a curve's last point: half of the layers, or of the visual tokens, is step 5000 in every model."""


def result_params(result: Result) -> dict[str, str]:
    """The strategy in the paper's terms and by module; groups are parted by commas."""
    return {"budget": result.budget.text, **strategy_params(result.strategy)}


def strategy_params(strategy: Strategy) -> dict[str, str]:
    """Depths, depth ratios and visual tokens, as in :func:`result_params`."""
    params = {**policy_text(strategy), "strategy": strategy.describe()}
    for module, depths in (strategy.depths() or {}).items():
        params[f"depth_{module}"] = ",".join(map(str, depths))
        params[f"depth_ratio_{module}"] = ",".join(f"{depth / strategy.num_layers:.4f}" for depth in depths)
    return params


def result_metrics(result: Result) -> dict[str, float]:
    """Every number of a result by a name that is the same across methods; what was not measured is left out."""
    values = result.model_dump(exclude={"budget", "strategy", "candidates", "uniform", "scores", "relative_mean"})
    uniform = {} if result.uniform is None else result.uniform.model_dump()
    values |= {f"uniform_{name}": value for name, value in uniform.items()}
    return numbers(values) | score_metrics(result.scores, result.relative_mean)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among values; of mappings as ``name/inner``, of intervals as ``…_ci_low``, ``…_ci_high``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in value.items()}
        elif name.endswith("_ci95") and value is not None:
            found |= zip((f"{name[:-2]}_low", f"{name[:-2]}_high"), value, strict=True)
        else:
            found[name] = value
    return {
        re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII): float(number)  # data may name families with any character
        for name, number in found.items()
        if isinstance(number, (bool, int, float)) and math.isfinite(number)
    }


def shared_params(record: Record) -> dict[str, str]:
    """What all budgets of a search share."""
    params = {
        "model": record.model.name,
        "num_layers": str(record.model.num_layers),
        "data": record.data.name,
        "num_samples": str(record.data.num_samples),
        "averaging": record.data.averaging,
        "answers": record.data.answers,
        "data_seed": str(record.data.seed),
    }
    for name, part in (("selector", record.selector), ("space", record.space), ("solver", record.solver)):
        params[name] = part.name
        params |= {f"{name}.{key}": str(value) for key, value in part.options.items()}
    return params


def run_name(record: Record, result: Result | None = None) -> str:
    """Model, space, budgets, seed, selector: what tells the runs of a sweep apart, first what a narrow column shows."""
    budgets = ",".join(item.budget.text for item in ([result] if result else record.results))
    return f"{record.model.name} {record.space.name} {budgets} seed{record.data.seed} {record.selector.name}"


def shared_metrics(record: Record) -> dict[str, float]:
    """Numbers of the search as a whole; ``under 0.3/kl_heldout`` per budget, ``lowest/…`` of the lowest KL."""
    values = record.model_dump(include={"num_validation_runs", "seconds", "floor_ratio"})
    values |= {f"seconds_{stage}": seconds for stage, seconds in record.timings.items()}
    best = min(record.results, key=lambda item: item.kl_heldout)
    for name, item in [("lowest", best), *((f"under {item.budget.text}", item) for item in record.results)]:
        values[name] = item.model_dump(include={"kl_heldout", "flops_ratio", "accuracy_pruned"})
    return numbers(values)


def curve_points(curves: Curves) -> list[Point]:
    """The mean KL in nats of the divergence curves: ``curve/mlp_depth`` and the like.

    A step is the share of the full value (of the layers, of the visual tokens) in ten-thousandths, so that the curves
    of models with different numbers of layers lie over each other.
    """
    return [
        (f"curve/{curve.parameter}", float(value), round(FULL_STEP * int(level) / int(curve.levels[-1])), None)
        for curve in curves.curves.values()
        if curve.levels[-1] > 0
        for level, value in zip(curve.levels, curve.mean_nats, strict=True)
    ]


def search_tags(record: Record) -> dict[str, str]:
    """Facts to filter runs by."""
    result = {"kind": "search", "model_fingerprint": record.model.fingerprint}
    result |= {f"data_fingerprint.{name}": value for name, value in record.data.fingerprints.items()}
    return result | {"mlflow.note.content": markdown(record)} | provenance_tags(record.provenance)


def provenance_tags(provenance: Provenance | None) -> dict[str, str]:
    """Where a run comes from, as tags."""
    if provenance is None:
        return {}
    tags = {"mlflow.user": getpass.getuser(), "mlflow.source.name": "dop-search", "mlflow.source.type": "LOCAL"}
    tags |= {f"version.{name}": version for name, version in provenance.versions.items()}
    known = provenance.search_id, provenance.git_commit, provenance.command
    names = "search_id", "mlflow.source.git.commit", "command"
    return tags | {name: value for name, value in zip(names, known, strict=True) if value is not None}


def started_ms(provenance: Provenance | None) -> int:
    """When a run began, in milliseconds since 1970; now if that is not known."""
    if provenance is None:
        return int(time.time() * 1000)
    return int(datetime.fromisoformat(provenance.started_at).timestamp() * 1000)


def evaluated_params(item: StrategyScores) -> dict[str, str]:
    """What was evaluated."""
    params = {"strategy": item.description} if item.strategy is None else strategy_params(item.strategy)
    if item.method is not None:
        params |= {name: str(item.method[name]) for name in ("method", "target_ratio")}
    return {**params, "file": item.file}


def evaluated_metrics(item: StrategyScores) -> dict[str, float]:
    """What it came to."""
    return numbers({"flops_ratio": item.flops_ratio}) | score_metrics(item.scores, item.relative_mean)


def benchmark_values(data: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, float]]:
    """Parameters and metrics of the JSON of ``dop-bench``."""
    params = {key: str(data[key]) for key in ("what", "text_tokens", "visual_tokens", "generated_tokens")}
    metrics = {}
    for row in data["rows"]:
        target = "" if row["target_ratio"] is None else f"{row['target_ratio']:g}_"
        values = {
            f"{name}_{part}": item["median"] for part in ("median", "ratio") for name, item in row[part].items() if item
        }
        metrics[(target + row["name"]).replace(" ", "_")] = {"flops_ratio": row["flops_ratio"], **values}
    return params | {key: str(value) for key, value in data["environment"].items()}, numbers(metrics)


def study_row_values(row: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, float]]:
    """A row of a study as parameters (texts, and the budget) and metrics (numbers, also those of nested mappings)."""
    params = {name: value for name, value in row.items() if isinstance(value, str)}
    if "budget" in row:
        params["budget"] = str(row["budget"])
    return {name: value[:500] for name, value in params.items()}, numbers(row)


def strategy_key(strategy: Strategy) -> str:
    """16 hex digits that name what a strategy computes."""
    return hashlib.sha256(strategy.key().encode()).hexdigest()[:16]


def score_metrics(scores: Mapping[str, ScoreComparison], mean: RelativeMean | None) -> dict[str, float]:
    """``score/gqa``, ``relative/gqa``, ``relative/mean`` and the same of uniform reduction; stable names."""
    values: dict[str, float | None] = {}
    for name, item in scores.items():
        values |= {
            f"score/{name}": item.pruned,
            f"score_full/{name}": item.full,
            f"score_uniform/{name}": item.uniform,
            f"relative/{name}": item.relative_pruned,
            f"relative_uniform/{name}": item.relative_uniform,
        }
        if item.ci95 is not None:
            values |= {f"difference_ci_low/{name}": item.ci95[0], f"difference_ci_high/{name}": item.ci95[1]}
    if mean is not None:
        values |= {"relative/mean": mean.pruned, "relative_uniform/mean": mean.uniform}
    return numbers(values)


def score_columns(scores: Mapping[str, ScoreComparison]) -> dict[str, list[Any]]:
    """The scores as a table, a row per benchmark; what was not measured is empty."""
    columns: dict[str, list[Any]] = {"benchmark": list(scores)}
    for field in ("full", "pruned", "uniform", "relative_pruned", "relative_uniform", "unit", "num_samples"):
        columns[field] = [getattr(item, field) for item in scores.values()]
    for name, field in (("difference", "ci95"), ("uniform_difference", "uniform_ci95")):
        ends = [getattr(item, field) or (None, None) for item in scores.values()]
        columns[f"{name}_ci_low"], columns[f"{name}_ci_high"] = ([pair[side] for pair in ends] for side in (0, 1))
    return columns

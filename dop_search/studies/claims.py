"""The paper's claims beside what the records of this project say, and what it would take to check them for good.

Measures nothing: reads the results of other experiments. Claims are those of arXiv 2507.02909.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dop_search.app.results import ResultFile, Row
from dop_search.app.workbench import Workbench
from dop_search.utils.errors import ConfigError

Records = Callable[[str], dict[str, Any]]
"""From a path below ``experiments/`` to its content."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        name: stable.
        claimed: what the paper says.
        measured: what the records say, in words, from the records.
        sources: experiments it reads.
        needed: what would check it on real models.
        command: that does it.
    """

    name: str
    claimed: str
    measured: Callable[[Records], str]
    sources: tuple[str, ...]
    needed: str
    command: str


def claims(bench: Workbench, results: ResultFile, experiments: str = "experiments") -> None:
    """One row per claim, from the records below ``experiments``; they are written anew every time."""
    for row in collect(Path(experiments)):
        results.add({"claim": row["claim"]}, row)
    results.sort([{"claim": claim.name} for claim in CLAIMS])


def collect(experiments: Path) -> list[Row]:
    """The rows of all claims.

    Raises:
        ConfigError: if a record is missing; names the command that makes it.
    """

    @cache
    def record(path: str) -> dict[str, Any]:
        try:
            return dict(json.loads((experiments / path).read_text()))
        except FileNotFoundError as error:
            name = path.partition("/")[0]
            raise ConfigError(f"no {str(experiments / path)!r}; run `dop-search experiment={name}` first") from error

    return [
        {
            "claim": claim.name,
            "claimed": claim.claimed,
            "measured": claim.measured(record),
            "sources": list(claim.sources),
            "needed": claim.needed,
            "command": claim.command,
        }
        for claim in CLAIMS
    ]


# -- what the records say ---------------------------------------------------------------------------


def _compared(record: Records) -> dict[tuple[str, float], Mapping[str, Any]]:
    return {(row["method"], row["budget"]): row for row in record("compare/result.json")["rows"]}


def _loss(record: Records) -> str:
    rows, budgets = _compared(record), (0.3, 0.2, 0.15, 0.1)
    parts = []
    for name in ("dop", "dop_search"):
        values = " / ".join(f"{rows[name, budget]['relative_mean']:.0f}" for budget in budgets)
        parts.append(f"`{name}` keeps {values} %")
    return f"of the accuracy at {' / '.join(f'{b:g}' for b in budgets)} of the FLOPs: {'; '.join(parts)}"


def _latency(record: Records) -> str:
    small = record("latency/small.json")["rows"]
    ours = next(row for row in small if row["name"] == "split" and row["target_ratio"] == 0.14)
    pocket = _compared(record)["dop_search", 0.15]["prefill_ms_ratio"]
    return (
        f"CPU: {ours['ratio']['prefill_ms']['median']:.3f} of the prefill time at 0.14 of the FLOPs (8 layers x 1024, "
        f"2,880 visual tokens, random weights); pocket model {pocket:.2f} at 0.15. One early GPU reading: 0.25 to 0.34"
    )


def _ranks(record: Records) -> str:
    result = record("compare/result.json")
    rank, rows = result["summary"]["mean_rank"], _compared(record)
    published = [name for name in rank if not name.startswith(("dop", "uniform_search"))]
    best = min(published, key=lambda name: rank[name])
    budgets = sorted({budget for _, budget in rows}, reverse=True)
    lowest = [
        f"{budget:g}"
        for budget in budgets
        if rows["dop_search", budget]["kl_heldout"]
        <= min(rows[name, budget].get("kl_heldout", float("inf")) for name in published)
    ]
    return (
        f"mean rank by held-out KL at equal FLOPs among {len(rank)}: `dop_search` {rank['dop_search']:.1f}, best of "
        f"the others (`{best}`) {rank[best]:.1f}, the paper's own space over CLS attention (`dop`) {rank['dop']:.1f}; "
        "`dop_search` is below all of them, GSOP over another selector included, at "
        f"{', '.join(lowest) or 'none'} of {len(budgets)} budgets"
    )


def _additive(record: Records) -> str:
    result = record("additive_vs_exact/result.json")
    grids = {row["space"]: row for row in result["rows"] if row["method"] == "grid"}
    gaps = [gap for gap in result["summary"]["gaps"] if gap["method"] == "additive"]
    exact = sum(gap["kl_search"] == 0.0 for gap in gaps)
    worst = max(gap["kl_search"] for gap in gaps)
    spearman = "; ".join(
        f"`{name}` {grid['spearman']:.2f}, cheap half {grid['spearman_cheap_half']:.2f}" for name, grid in grids.items()
    )
    return (
        f"Spearman with exact KL over whole grids: {spearman}. Its optimum is the exact one in {exact} of {len(gaps)} "
        f"cells (space x budget); the largest gap on the search samples is {worst:.3f} nats"
    )


def _samples(record: Records) -> str:
    rows = [row for row in record("validation_size/result.json")["rows"] if row["budget"] == 0.3]
    values = ", ".join(
        f"{row['num_samples']}: {row['kl_heldout']['rerank']:.2f} ({max(row['kl_heldout_draws']['rerank']):.2f})"
        for row in rows
    )
    return (
        f"held-out KL at 0.3 by number of search samples, mean of {rows[0]['num_draws']} draws (worst) from a pool of "
        f"{rows[-1]['num_samples']}, which is one draw: {values}"
    )


def _seconds(record: Records) -> str:
    main = record("main/record.json")
    timings = main["timings"]
    searching = timings["teacher_search"] + timings["curves"] + timings["solve"]
    return (
        f"{searching:.0f} s on two CPU cores for three budgets of the pocket model, the full model's answers included; "
        f"{main['results'][0]['num_validation_runs']} validation runs of 96 samples for a budget"
    )


def _transfer(record: Records) -> str:
    rows = record("transfer/result.json")["rows"]
    own = {(row["budget"], row["axis"], row["source"]): row["kl_heldout"] for row in rows if row["target"] == "pocket"}
    parts = [
        f"{budget:g}: {own[budget, 'model', 'pocket/stretched']:.3f}, {own[budget, 'model', 'pocket/shallow']:.3f}, "
        f"searched here {own[budget, 'target', '']:.3f}, uniform {own[budget, 'uniform', '']:.3f}"
        for budget in sorted({row["budget"] for row in rows}, reverse=True)
    ]
    return (
        "held-out KL on the pocket model of strategies by depth ratio, from the one with 18 layers and from the one "
        f"with another depth profile: {'; '.join(parts)}"
    )


def _depth(record: Records) -> str:
    rows = record("depthwise_vs_free/result.json")["rows"]
    values = {row["name"]: row["spearman_with_depth"] for row in rows if row["kind"] == "single"}
    text = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
    return f"Spearman of depth with the KL of skipping one layer (below 0: deeper is more redundant): {text}"


def _free(record: Records) -> str:
    differences = record("depthwise_vs_free/result.json")["summary"]["differences"]
    parts = [
        f"{item['budget']:g} {item['name']} {item['kl_heldout']:+.3f} [{low:+.3f}, {high:+.3f}]"
        for item in differences
        if item["name"] in ("window", "free", "gsop")
        for low, high in [item["kl_heldout_ci95"]]
    ]
    return f"held-out KL minus that of exit depths, paired 95 % interval: {'; '.join(parts)}"


def _selectors(record: Records) -> str:
    summary = record("selectors/result.json")["summary"]
    parts = []
    for budget, item in summary.items():
        intervals = list(item["differences"].values())
        better, worse = sum(high < 0 for _, high in intervals), sum(low > 0 for low, _ in intervals)
        parts.append(f"{budget}: {better} of {len(intervals)} better, {worse} worse")
    return f"found operations against none over the same selector (paired interval off 0): {'; '.join(parts)}"


def _benchmarks(record: Records) -> str:
    scores = record("pocket13/scores.json")
    mean = scores["relative_mean"]
    return (
        f"rendered rows, the pocket model: {mean['pruned']:.1f} % of the full model's scores at 0.3 of the FLOPs, "
        f"uniform reduction {mean['uniform']:.1f} %"
    )


def _families(record: Records) -> str:
    return (
        "none of the real checkpoints; all seven families' architectures with small random weights pass the same "
        "conformance suite"
    )


CHECKPOINT = "the checkpoint, the benchmarks' data, a GPU"

CLAIMS = (
    Claim(
        "flops",
        "LLaVA-NeXT-7B: 86 % fewer TFLOPs at 1 % loss, 77 % fewer at none",
        _loss,
        ("compare",),
        CHECKPOINT,
        "dop-search model=llava_next_7b data=mixed selector=cdpruner eval=dop13 'budget=[0.23,0.14]'",
    ),
    Claim(
        "latency",
        "83 % less latency at 86 % fewer TFLOPs (A100)",
        _latency,
        ("latency", "compare"),
        "a GPU; no checkpoint",
        "dop-bench --shape llava_next_7b --compile",
    ),
    Claim(
        "baselines",
        "better than 12 baselines, by up to 7 %",
        _ranks,
        ("compare",),
        CHECKPOINT,
        "dop-search experiment=compare model=llava_next_7b data=mixed study.workers=1 "
        "study.folder=outputs/compare_next",
    ),
    Claim(
        "additive",
        "the additive approximation ranks policies as exact KL does",
        _additive,
        ("additive_vs_exact",),
        "a checkpoint and hours of a GPU for the exact grid",
        "dop-search experiment=additive_vs_exact model=llava_1_5_7b data=mixed study.folder=outputs/additive",
    ),
    Claim(
        "samples",
        "25 to 100 validation samples are enough",
        _samples,
        ("validation_size",),
        CHECKPOINT,
        "dop-search experiment=validation_size model=llava_1_5_7b data=mixed study.workers=1 study.folder=outputs/size",
    ),
    Claim(
        "seconds",
        "the search takes as little as two minutes",
        _seconds,
        ("main",),
        "a checkpoint and a GPU",
        "dop-search model=llava_1_5_7b data=mixed",
    ),
    Claim(
        "depth_ratio",
        "depth ratios transfer between models",
        _transfer,
        ("transfer",),
        "two checkpoints of a family",
        "dop-search experiment=transfer model=llava_1_5_7b 'study.options.models=[llava-hf/llava-1.5-13b-hf]' "
        "study.folder=outputs/transfer",
    ),
    Claim(
        "redundancy",
        "deeper operations are more redundant",
        _depth,
        ("depthwise_vs_free",),
        "a checkpoint",
        "dop-search experiment=depthwise_vs_free model=llava_1_5_7b data=mixed study.folder=outputs/depth",
    ),
    Claim(
        "depthwise",
        "exit depths instead of free layer sets (GSOP)",
        _free,
        ("depthwise_vs_free",),
        "a checkpoint",
        "dop-search experiment=depthwise_vs_free model=llava_1_5_7b data=mixed study.folder=outputs/depth",
    ),
    Claim(
        "selectors",
        "works on top of VisPruner, CDPruner and input resizing",
        _selectors,
        ("selectors",),
        CHECKPOINT,
        "dop-search experiment=selectors model=llava_1_5_7b data=mixed study.folder=outputs/selectors",
    ),
    Claim(
        "models",
        "six MLLMs: LLaVA-1.5 7B and 13B, LLaVA-NeXT 7B and 13B, Qwen2.5-VL 7B, InternVL3 8B",
        _families,
        (),
        "the checkpoints",
        "dop-search -m model=llava_1_5_7b,llava_1_5_13b,llava_next_7b,llava_next_13b,qwen2_5_vl_7b,internvl3_8b "
        "selector=received_attention data=mixed",
    ),
    Claim(
        "benchmarks",
        "13 benchmarks",
        _benchmarks,
        ("pocket13",),
        CHECKPOINT,
        "dop-eval strategy=strategy.json eval=dop13 model=llava_next_7b",
    ),
)

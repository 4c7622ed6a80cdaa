"""How long the exact solver of the surrogate takes at a 7B model's size, and how long it took at an earlier commit.

    uv run python experiments/bench_search/solver.py --before f5544cc

Each measurement is a process of its own that imports the package from ``git archive`` of a commit; the commits take
turns. What is measured is written to ``solver.json`` beside this file at once, and the same command goes on from there.
Seconds are those that the process computed, on one thread, so that other processes do not count.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dop_search.utils.files import write_text_atomic

HERE = Path(__file__).parent
NUM_LAYERS, NUM_VISUAL = 32, 2880
SPACES = ("dop", "dop_split", "dop_groups")
RATIOS = (0.14, 0.3, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--after", default="HEAD", help="the commit that is measured (HEAD)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spaces", nargs="+", default=SPACES)
    parser.add_argument("--limit", type=int, default=600, help="CPU seconds of a process, after which it is ended")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "solver.json")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    commits = [git("rev-parse", "--short", name).decode().strip() for name in (args.before, args.after) if name]
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    runs: dict[str, dict[str, list[dict[str, float]]]] = known.get("runs", {})
    with tempfile.TemporaryDirectory() as folder:
        for commit in commits:
            with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "dop_search"))) as files:
                files.extractall(Path(folder) / commit, filter="data")
        for number in range(args.rounds):
            for space in args.spaces:
                for commit in commits:
                    its = runs.setdefault(space, {}).setdefault(commit, [])
                    if len(its) <= number:
                        its.append(in_a_process(space, Path(folder) / commit, args.limit))
                        result = {"limit_s": args.limit, "summary": summary(runs), "runs": runs}
                        write_text_atomic(args.out, json.dumps(result, indent=1) + "\n")
                        print(space, commit, its[-1], flush=True)


def git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=HERE.parents[1], capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return done.stdout


def in_a_process(space: str, tree: Path, limit: int) -> dict[str, float]:
    """What was measured, as far as the limit allowed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", space]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
    )
    if done.returncode > 0:
        raise SystemExit(done.stderr)
    found: dict[str, float] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found if done.returncode == 0 else {**found, "ended_after_s": limit}


def summary(runs: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians per space and commit, and whether all that were not ended found the same."""
    result: dict[str, Any] = {}
    for space, by_commit in runs.items():
        whole = {commit: its for commit, its in by_commit.items() if its}
        result[space] = {
            commit: {
                key: statistics.median(run[key] for run in its) for key in its[0] if all(key in run for run in its)
            }
            for commit, its in whole.items()
        }
        for key in ("points", "checksum", "budget_checksum", "candidates_checksum"):
            values = {row[key] for row in result[space].values() if key in row}
            result[space].setdefault("same", {})[key] = len(values) == 1
    return result


def measure(name: str) -> None:
    """Print seconds for the front, for a further budget on it, and for the 16 candidates of a budget, each when it is
    known."""
    from dop_search.search import Problem, Space, Surrogate, additive_exact, best_candidates, pareto_front
    from dop_search.strategy.cost import Budget, CostModel
    from dop_search.strategy.operations import ModelDims, TokenCounts

    make = {
        "dop": Space.dop,
        "dop_split": Space.dop_split,
        "dop_groups": lambda *sizes: Space.dop_groups(*sizes, shares=(0.25, 0.75)),
    }
    space, curves = make[name](NUM_LAYERS, NUM_VISUAL), {}
    for parameter in space.parameters:
        x = np.array(parameter.levels) / parameter.full
        weight = {"q": 0.01, "kv": 1.0, "attention": 1.0, "mlp": 0.4, "tokens": 0.5}[parameter.role]
        curves[parameter.name] = weight * (1 + parameter.group) * (1 - x) ** (2 if parameter.role == "tokens" else 4)
    dims = ModelDims(NUM_LAYERS, 4096, 11008, num_heads=32, num_kv_heads=32, head_dim=128)
    counts = [TokenCounts(40 + i, NUM_VISUAL) for i in range(50)]
    problem = Problem(space, CostModel(dims, counts), Surrogate(space, curves))
    start = time.process_time()
    front = pareto_front(problem)
    show(front_s=time.process_time() - start, points=len(front), checksum=float(front.divergence_nats.sum()))
    start = time.process_time()
    found = [additive_exact(problem, Budget(flops_ratio=ratio)) for ratio in RATIOS]
    seconds = (time.process_time() - start) / len(RATIOS)
    show(budget_s=seconds, budget_checksum=sum(item.kl_additive for item in found))
    start = time.process_time()
    found = [best_candidates(problem, Budget(flops_ratio=ratio))[-1] for ratio in RATIOS]
    seconds = (time.process_time() - start) / len(RATIOS)
    show(candidates_s=seconds, candidates_checksum=sum(item.kl_additive for item in found))


def show(**values: float) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()

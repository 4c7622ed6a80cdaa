"""How long the exact solver of the surrogate takes at a 7B model's size, and how long it took at an earlier commit.

    uv run python experiments/bench_search/solver.py --before f5544cc

Each measurement is a process of its own that imports the package from here or from ``git archive`` of the earlier
commit; both run alternately. Writes ``solver.json`` beside this file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
NUM_LAYERS, NUM_VISUAL = 32, 2880
SPACES = ("dop", "dop_split", "dop_groups")
RATIOS = (0.14, 0.3, 0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", help="a commit to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spaces", nargs="+", default=SPACES)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "solver.json")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        trees = {"after": HERE.parents[1]}
        if args.before:
            archive = subprocess.run(
                ["git", "archive", args.before, "dop_search"], cwd=HERE.parents[1], capture_output=True
            )
            if archive.returncode:
                raise SystemExit(archive.stderr.decode())
            trees = {"before": Path(folder), **trees}
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
                files.extractall(folder, filter="data")
        result = {space: compare(space, trees, args.rounds) for space in args.spaces}
    args.out.write_text(json.dumps({"before": args.before, "rounds": args.rounds, "spaces": result}, indent=2) + "\n")
    for space, rows in result.items():
        print(space, json.dumps(rows))


def compare(space: str, trees: dict[str, Path], rounds: int) -> dict[str, object]:
    """Medians in seconds of each tree, and whether all found the same."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(rounds):
        for name, tree in trees.items():
            command = [sys.executable, str(Path(__file__).resolve()), "--measure", space]
            environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(done.stdout))
    medians = {name: {key: statistics.median(run[key] for run in its) for key in its[0]} for name, its in runs.items()}
    same = len({(its["points"], its["checksum"]) for its in medians.values()}) == 1
    return {**medians, "same": same}


def measure(name: str) -> dict[str, float]:
    """Seconds for the front, for a further budget on it, and for the 16 candidates of a budget."""
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
    start, cpu = time.perf_counter(), time.process_time()
    front = pareto_front(problem)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    found = [additive_exact(problem, Budget(flops_ratio=ratio)) for ratio in RATIOS]
    budget = (time.perf_counter() - start) / len(RATIOS)
    start = time.perf_counter()
    found += [best_candidates(problem, Budget(flops_ratio=ratio))[-1] for ratio in RATIOS]
    candidates = (time.perf_counter() - start) / len(RATIOS)
    checksum = float(front.divergence_nats.sum() + sum(item.kl_additive for item in found))
    return {
        "front_s": seconds,
        "front_cpu_s": cpu_seconds,
        "budget_s": budget,
        "candidates_s": candidates,
        "points": len(front),
        "checksum": checksum,
    }


if __name__ == "__main__":
    main()

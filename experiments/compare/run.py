"""Every method at the same FLOPs: held-out KL and accuracy of the pocket model, one row per method and budget.

    python experiments/compare/run.py --budgets 0.3 0.15

Rows are written as they come, and rows that are there are not measured again. A method that cannot reach a budget, or
that the model lacks something for, gets a row with the reason.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dop_search as dop
from dop_search.baselines import BASELINES, FitContext, FittedMethod, plain_answers, plain_divergence
from dop_search.divergence import make_teacher
from dop_search.errors import DopError
from dop_search.evaluation import correct_answers
from dop_search.files import write_text_atomic
from dop_search.models.fast_linear import fast_linear
from dop_search.progress import default_progress, watch
from dop_search.selectors import make_selector
from dop_search.statistics import bootstrap_ci95
from dop_search.strategy import Strategy

SELECTOR = "cls_attention"
OURS = ("dop", "dop_split", "dop_split@received_attention", "dop_split@divprune")
"""Search spaces of ours, over ``SELECTOR`` or over the selector behind the ``@``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.15, 0.1], help="FLOPs ratios")
    parser.add_argument("--num-search", type=int, default=96, help="samples that our search and the baselines' own see")
    parser.add_argument("--num-heldout", type=int, default=192)
    parser.add_argument("--num-test", type=int, default=204)
    parser.add_argument("--methods", nargs="+", default=[*OURS, *BASELINES])
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/dop_search"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "result.json")
    args = parser.parse_args()
    loaded = dop.load("pocket")
    with fast_linear(loaded.model):
        compare(loaded, args)


def compare(loaded: Any, args: argparse.Namespace) -> None:
    """Measure every row that ``args.out`` lacks."""
    sizes = {"search": args.num_search, "heldout": args.num_heldout, "test": args.num_test}
    data = {split: dop.validation_set("pocket", size, split=split) for split, size in sizes.items()}
    teachers = {
        split: make_teacher(loaded, data[split], make_selector(SELECTOR), cache_dir=args.cache_dir)
        for split in ("search", "heldout")
    }
    context = FitContext.from_teacher(loaded, teachers["search"], SELECTOR)
    profiles: dict[str, dop.Profile] = {}

    def fit(name: str, ratio: float) -> FittedMethod:
        if name in BASELINES:
            return BASELINES[name].fit(context, ratio)
        if name not in profiles:
            space, _, selector = name.partition("@")
            profiles[name] = dop.profile(
                loaded, data["search"], selector or SELECTOR, space=space, cache_dir=args.cache_dir
            )
        return found(profiles[name].rerank(dop.Budget(flops_ratio=ratio)), profiles[name], name)

    known = json.loads(args.out.read_text()) if args.out.exists() else {"sizes": sizes, "full": {}, "rows": []}
    if known["sizes"] != sizes:
        raise SystemExit(f"{args.out} was measured with {known['sizes']}, not {sizes}; choose another --out")
    samples = data["test"].samples
    if not known["full"]:
        right = correct_answers(plain_answers(loaded, samples, Strategy.full(loaded.adapter.dims.num_layers)), samples)
        known["full"] = {"accuracy": float(right.mean())}
    todo = [(budget, name) for budget in args.budgets for name in args.methods]
    done = {(row["budget"], row["method"]) for row in known["rows"]}
    with watch(default_progress()) as notify:
        for count, (budget, name) in enumerate(todo, start=1):
            if (budget, name) not in done:
                row = {"method": name, "budget": budget}
                try:
                    row |= measure(loaded, fit(name, budget), data["heldout"].samples, teachers["heldout"], samples)
                except DopError as error:
                    row["infeasible"] = str(error)
                known["rows"].append(row)
                write_text_atomic(args.out, json.dumps(known, indent=1) + "\n")
            notify(count, len(todo), "methods at equal FLOPs")


def found(strategy: Strategy, profile: dop.Profile, name: str) -> FittedMethod:
    """A strategy of our own search, as the baselines are handed over."""
    ratio = profile.problem().cost_model.ratio(strategy)
    return FittedMethod(name, ratio, ratio, {"strategy": strategy.describe()}, strategy=strategy)


def measure(
    loaded: Any, fitted: FittedMethod, heldout: Sequence[Any], teacher: Any, test: Sequence[Any]
) -> dict[str, Any]:
    """One row: held-out KL with its interval, accuracy, FLOPs, hyperparameters."""
    kl = plain_divergence(loaded, heldout, teacher, fitted)
    right = correct_answers(plain_answers(loaded, test, fitted), test)
    return {
        "flops_ratio": fitted.flops_ratio,
        "kl_heldout": float(kl.mean()),
        "kl_ci95": list(bootstrap_ci95(kl)),
        "accuracy": float(np.mean(right)),
        "hyperparameters": json.loads(json.dumps(dict(fitted.hyperparameters), default=str)),
        "notes": list(fitted.notes),
    }


if __name__ == "__main__":
    main()

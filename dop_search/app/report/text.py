"""How numbers and strategies are written in tables, plots and tracking."""

from __future__ import annotations

from dop_search.app.record import Record, Result
from dop_search.strategy import Strategy
from dop_search.strategy.operations import Module
from dop_search.strategy.policy import GroupPolicy
from dop_search.utils.intervals import MIN_DOMINANT

MAX_P = 0.05
"""From this p-value on there is no difference."""
NONE = "–"


def kl_text(value: float | None) -> str:
    """A KL in nats with two or three significant digits, e.g. ``0.0123`` or ``8.1e-05``."""
    if value is None:
        return NONE
    if value == 0.0:
        return "0"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.1e}"


def interval_text(interval: tuple[float, float] | None) -> str:
    """A confidence interval, e.g. ``0.0100…0.0150``."""
    return NONE if interval is None else f"{kl_text(interval[0])}…{kl_text(interval[1])}"


def percent_text(value: float | None) -> str:
    """A ratio as per cent, without the sign."""
    return NONE if value is None else f"{100 * value:.1f}"


def policy_text(strategy: Strategy) -> dict[str, str]:
    """The paper's ``D_A``, ``D_P`` and ``n_v``, and the depths as shares of the layers; groups are parted by commas.

    ``D_A`` is one number where q and kv are tied, ``q/kv`` where they differ; a free layer set reads as the number of
    its layers in braces.
    """
    groups, num_layers = strategy.groups, strategy.num_layers
    return {
        "D_A": ",".join(_attention(group, None) for group in groups),
        "D_P": ",".join(_depth(group, Module.MLP, None) for group in groups),
        "n_v": strategy.describe_tokens(),
        "D_A_ratio": ",".join(_attention(group, num_layers) for group in groups),
        "D_P_ratio": ",".join(_depth(group, Module.MLP, num_layers) for group in groups),
    }


def _attention(group: GroupPolicy, num_layers: int | None) -> str:
    q, kv = group.depth(Module.Q), group.depth(Module.KV)
    # The query of the last layer with keys is dead, so a tied strategy may come without it.
    tied = q is not None and kv is not None and q in (kv, kv - 1)
    both = (Module.KV,) if tied else (Module.Q, Module.KV)
    return "/".join(_depth(group, module, num_layers) for module in both)


def _depth(group: GroupPolicy, module: Module, num_layers: int | None) -> str:
    depth = group.depth(module)
    if num_layers is None:
        return f"{{{len(group.layers(module))}}}" if depth is None else str(depth)
    return NONE if depth is None else f"{depth / num_layers:.2f}"


def verdict(result: Result) -> str:
    """``better``, ``worse`` or ``no difference``: the held-out KL against uniform reduction, tested pair by pair."""
    interval = result.kl_heldout_difference_ci95
    if result.uniform is None:
        return NONE
    if interval is None:
        lower = result.kl_heldout < result.uniform.kl_heldout
        return "lower, untested" if lower else "not lower, untested"
    low, high = interval
    if result.kl_heldout_difference_p is None:  # a record from before there was a test
        return "better" if high < 0.0 else "worse" if low > 0.0 else "no difference"
    if result.kl_heldout_difference_p >= MAX_P:
        return "no difference"
    return "better" if result.kl_heldout < result.uniform.kl_heldout else "worse"


def lead(record: Record) -> list[str]:
    """What was found and how sure it is, in sentences: first the cheapest budget with a significant difference."""
    groups: dict[str, list[Result]] = {}
    for result in sorted(record.results, key=lambda item: item.flops_ratio):
        groups.setdefault(verdict(result), []).append(result)
    order: list[str] = [word for word in ("better", "worse", "no difference") if word in groups]
    order += [word for word in groups if word not in order]
    first, *others = groups[order[0]]
    sentences = [_found(first, record.data.num_heldout)]
    if others:
        sentences.append(f"The same holds at {_budgets(others)}.")
    sentences += [f"At {_budgets(groups[word])}: {_SAID[word]}." for word in order[1:]]
    if first.accuracy_full is not None and first.uniform is not None:
        sentences.append(
            f"Task accuracy at {percent_text(first.flops_ratio)} %: {percent_text(first.accuracy_full)} % full, "
            f"{percent_text(first.accuracy_pruned)} % found, {percent_text(first.uniform.accuracy)} % uniform."
        )
    return sentences


_SAID = {
    "better": "closer to the full model than uniform token reduction",
    "worse": "farther from the full model than uniform token reduction",
    "no difference": "no significant difference from uniform token reduction",
    "lower, untested": "lower than uniform token reduction, but the difference was not tested",
    "not lower, untested": "not lower than uniform token reduction; the difference was not tested",
    NONE: "nothing to compare with, uniform token reduction does not fit",
}


def _found(result: Result, num_heldout: int) -> str:
    start = (
        f"At {percent_text(result.flops_ratio)} % of the prefill FLOPs the found strategy is "
        f"{kl_text(result.kl_heldout)} nats from the full model on {num_heldout} held-out samples"
    )
    if result.uniform is None:
        return f"{start}: {_SAID[NONE]}."
    start += f", uniform token reduction {kl_text(result.uniform.kl_heldout)}: "
    if result.kl_heldout_difference_ci95 is None:
        return f"{start}{_SAID[verdict(result)]}."
    between = f"95 % interval of the difference {interval_text(result.kl_heldout_difference_ci95)}"
    sure = {"better": "significantly closer", "worse": "significantly farther"}
    return f"{start}{sure.get(verdict(result), 'no significant difference')} ({between})."


def _budgets(results: list[Result]) -> str:
    return ", ".join(f"{percent_text(item.flops_ratio)} %" for item in results)


def alt_text(figure: str, record: Record) -> str:
    """What a figure of the report shows, for those who do not see it."""
    results = sorted(record.results, key=lambda item: item.flops_ratio)
    costs = [f"{percent_text(item.flops_ratio)} % of the FLOPs" for item in results]
    points = "; ".join(f"{cost}, {kl_text(item.kl_heldout)}" for cost, item in zip(costs, results, strict=True))
    kept = "; ".join(f"{cost}: {item.strategy.describe()}" for cost, item in zip(costs, results, strict=True))
    texts = {
        "layer_map": f"Grid of layers and modules that run on visual tokens, per budget. {kept}.",
        "pareto_front": f"KL to the full model over FLOPs, found and uniform. Held-out KL: {points}.",
        "divergence_curves": (
            f"KL over exit depth (of {record.model.num_layers} layers) and over the number of visual tokens, a line "
            "per parameter, falling towards full."
        ),
        "relative_scores": "Bars: per cent of the full model's score that is left, per benchmark, as in the table.",
        "additive_vs_exact": (
            f"Exact KL over the additive estimate of {len(record.all_candidates())} measured candidates, with the "
            "diagonal where both are equal."
        ),
    }
    return texts[figure]


def notes(record: Record) -> list[str]:
    """What has to be known to read the summary."""
    full = record.results[0].accuracy_full
    data = record.data
    lines = [
        f"{record.model.name} on {data.name}; KL in nats, mean of {data.num_samples} search and "
        f"{data.num_heldout} held-out samples.",
        f"D_A, D_P: exit depths of attention (q/kv if they differ) and MLP, of {record.model.num_layers} layers.",
        "n_v: visual tokens in the decoder; uniform: only fewer of them, same FLOPs.",
        f"Validation runs: {', '.join(f'{_effort(result)} at {result.budget.text}' for result in record.results)}.",
    ]
    if full is not None:
        lines.append(f"Accuracy of the full model on {data.num_test} test samples: {percent_text(full)} %.")
    if record.floor_ratio is not None:
        lines.append(f"The text tokens, never pruned, cost {percent_text(record.floor_ratio)} % of the FLOPs.")
    timed = [
        f"{percent_text(item.latency_ratio)} % at {item.budget.text}" for item in record.results if item.latency_ratio
    ]
    if timed:
        lines.append(f"Prefill time on this device, predicted by its layer times: {', '.join(timed)}.")
    verdicts = ", ".join(f"{verdict(result)} at {result.budget.text}{_p_text(result)}" for result in record.results)
    tested = any(result.kl_heldout_difference_p is not None for result in record.results)
    how = "sign flips, Holm" if tested else "paired by sample"
    lines.append(f"Held-out KL against uniform reduction ({how}): {verdicts}.")
    if len({item.selector for result in record.results for item in result.candidates}) > 1:
        chosen = {result.budget.text: str(result.strategy.selector) for result in record.results}
        places = ", ".join(f"{name} at {budget}" for budget, name in chosen.items())
        if len(set(chosen.values())) == 1 < len(chosen):
            places = f"{record.results[0].strategy.selector} at every budget"
        lines.append(f"Selector: {places}; {record.data.num_decision} more samples decided.")
    signs = []
    if any("{" in text for result in record.results for text in policy_text(result.strategy).values()):
        signs.append("{n}: n layers, not the first n")
    if any(len(result.strategy.groups) > 1 for result in record.results):
        signs.append("several depths: one per group of tokens")
    if signs:
        lines.append(f"{'; '.join(signs)}.")
    few = [
        f"{item.num_dominant} at {item.budget.text}"
        for item in record.results
        if item.num_dominant is not None and item.num_dominant < MIN_DOMINANT
    ]
    if few:
        lines.append(f"So few samples carry 90 % of a KL that its interval is uncertain: {', '.join(few)}.")
    return lines


def _p_text(result: Result) -> str:
    p = result.kl_heldout_difference_p
    return "" if p is None else f" (p {'< .001' if p < 0.001 else f'= {p:.2g}'.replace('0.', '.')})"


def _effort(result: Result) -> str:
    return f"{result.num_validation_runs} ({result.seconds:.0f} s)"

"""A published method at a budget, in one call."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from dop_search.baselines import parse_method
from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.uniform import UniformReduction
from dop_search.data.samples import ValidationSet
from dop_search.divergence import Teacher, make_teacher
from dop_search.divergence.profiling import MeasuredProfile, OnProgress, default_shares, evaluation_store, profile
from dop_search.models.loading import LoadedModel
from dop_search.selectors import Selector, make_selector
from dop_search.utils.errors import ConfigError


def fit(
    method: str | Method,
    loaded: LoadedModel,
    data: ValidationSet,
    *,
    flops_ratio: float,
    selector: str | Selector | None = None,
    teacher: Teacher | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    cache_dir: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> FittedMethod:
    """Solve a published method for a share of the full model's FLOPs; ``with fitted.apply(model):`` runs it.

    Args:
        method: a name of ``dop_search.baselines.BASELINES`` (a selector's name is uniform reduction by it), one of our
            searches (``dop``, ``dop_split``, ``dop_groups``), ``uniform``, ``full``, any of these that use a selector
            as ``NAME@SELECTOR``, or a method of one's own.
        loaded: the model.
        data: validation samples: what FLOPs are counted on and what methods that measure, measure on.
        flops_ratio: prefill FLOPs relative to the full model, text included, in (0, 1].
        selector: ranks the visual tokens before the decoder, for methods that need a ranking and bring none; default:
            the one after the ``@``, or else ``cls_attention``, or ``divprune`` where the tower has no CLS token.
        teacher: the full model's answers, if they are at hand; ranked by ``selector``.
        max_new_tokens, batch_size: see ``make_teacher``.
        cache_dir: keeps the full model's answers and every evaluation.
        on_progress: called with (done, total, what).

    Raises:
        BudgetError: if the method cannot be so cheap; names the smallest feasible ratio.
        DopError: on an unknown method, or a teacher of another selector.
    """
    chosen, own = parse_method(method) if isinstance(method, str) else (method, None)
    if own is not None and selector is not None:
        raise ConfigError(f"`selector` is given twice, by {method!r} and by {selector!r}; leave one of them out")
    named = selector or own or ("cls_attention" if loaded.adapter.has_cls else "divprune")
    ranker = make_selector(named) if isinstance(named, str) else named
    is_named = isinstance(chosen, UniformReduction) and ranker.name == chosen.name
    if is_named and ranker != make_selector(chosen.name, chosen.options):  # type: ignore[attr-defined]
        raise ConfigError(
            f"{chosen.name!r} is uniform reduction by that selector with its usual options, but `selector` is "
            f"{ranker!r}; ask for method 'uniform' with it"
        )
    cache = None if cache_dir is None else Path(cache_dir)
    known = teacher or make_teacher(
        loaded,
        data,
        ranker,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        cache_dir=cache,
        on_progress=None if on_progress is None else partial(_answers, on_progress),
    )
    if known.selector != ranker:
        raise ConfigError(
            f"`teacher` has its tokens ranked by {known.selector!r}, but `selector` is {ranker!r}; pass that selector"
        )

    def ranked(other: str) -> Teacher:
        """The same answers with the visual tokens ranked by another selector."""
        answers = [sample.answer_ids for sample in known.samples]
        return make_teacher(loaded, data, make_selector(other), cache_dir=cache, answer_ids=answers)

    def curves(space: Any, other: str | None) -> MeasuredProfile:
        """The curves of a space, by the teacher's selector or another."""
        its = known if other is None else ranked(other)
        return profile(
            loaded,
            data,
            its.selector,
            space=space,
            shares=default_shares(space),
            teacher=its,
            cache_dir=cache,
            on_progress=on_progress,
        )

    store = evaluation_store(loaded, known, cache_dir=cache)
    context = FitContext.from_teacher(
        loaded,
        known,
        ranker.name,
        ranker.options(),
        evaluate=store.means(on_progress),
        samples=data.samples,
        profile=curves,
        store=lambda other: evaluation_store(loaded, ranked(other), cache_dir=cache),
        on_progress=on_progress,
    )
    return chosen.fit(context, flops_ratio)


def _answers(on_progress: OnProgress, done: int, total: int) -> None:
    on_progress(done, total, "the full model's answers")

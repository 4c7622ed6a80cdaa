"""A published method at a budget, in one call."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dop_search.baselines import baseline
from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.data.samples import ValidationSet
from dop_search.divergence import Teacher, make_teacher
from dop_search.divergence.profiling import OnProgress, evaluation_store
from dop_search.models.loading import LoadedModel
from dop_search.selectors import Selector, make_selector
from dop_search.utils.errors import ConfigError


def fit(
    method: str | Method,
    loaded: LoadedModel,
    data: ValidationSet,
    *,
    flops_ratio: float,
    selector: str | Selector = "cls_attention",
    teacher: Teacher | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    cache_dir: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> FittedMethod:
    """Solve a published method for a share of the full model's FLOPs; ``with fitted.apply(model):`` runs it.

    Args:
        method: a name of ``dop_search.baselines.BASELINES`` (a selector's name is uniform reduction by it), or a
            method of one's own.
        loaded: the model.
        data: validation samples: what FLOPs are counted on and what methods that measure, measure on.
        flops_ratio: prefill FLOPs relative to the full model, text included, in (0, 1].
        selector: ranks the visual tokens before the decoder, for methods that need a ranking and bring none.
        teacher: the full model's answers, if they are at hand; ranked by ``selector``.
        max_new_tokens: longest answer of the full model.
        batch_size: samples per generation call.
        cache_dir: keeps the full model's answers and every evaluation.
        on_progress: called with (done, total, what).

    Raises:
        BudgetError: if the method cannot be so cheap; names the smallest feasible ratio.
        DopError: on an unknown method, or a teacher of another selector.
    """
    chosen = baseline(method) if isinstance(method, str) else method
    ranker = make_selector(selector) if isinstance(selector, str) else selector
    cache = None if cache_dir is None else Path(cache_dir)
    if teacher is None:
        teacher = make_teacher(
            loaded,
            data,
            ranker,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            cache_dir=cache,
            on_progress=None if on_progress is None else partial(_answers, on_progress),
        )
    elif teacher.selector != ranker:
        raise ConfigError(
            f"`teacher` has its tokens ranked by {teacher.selector!r}, but `selector` is {ranker!r}; pass that selector"
        )
    store = evaluation_store(loaded, teacher, cache_dir=cache)
    context = FitContext.from_teacher(
        loaded,
        teacher,
        ranker.name,
        ranker.options(),
        evaluate=lambda strategies: store.evaluate(strategies, on_progress=on_progress).mean(axis=1),
        samples=data.samples,
    )
    return chosen.fit(context, flops_ratio)


def _answers(on_progress: OnProgress, done: int, total: int) -> None:
    on_progress(done, total, "the full model's answers")

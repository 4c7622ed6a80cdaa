"""The model ``dop`` of lmms-eval with published methods: ``--model_args method=fastv,flops_ratio=0.23``."""

from __future__ import annotations

from typing import Any

from dop_search.baselines.fitting import fit
from dop_search.data.validation import validation_set
from dop_search.evaluation.lmms import model as plain
from dop_search.models.fast_linear import fast_linear
from dop_search.utils.errors import DopError


class DopLmms(plain.DopLmms):
    """``lmms-eval --model dop --model_args pretrained=pocket,method=fastv,flops_ratio=0.23``, or ``strategy=FILE``.

    The method is fitted once, when the model is loaded, on search samples: by each of several processes for itself.

    Args:
        method: as in :func:`dop_search.fit`, instead of a strategy.
        flops_ratio: of the full model's prefill; needless for ``method=full``.
        data: validation samples by name, see ``conf/data``.
        num_samples: how many.
        data_seed: of drawing them.
        cache_dir: keeps what fitting measured, for the next time.
        **options: as of :class:`dop_search.evaluation.lmms.model.DopLmms`; with a method, ``selector`` is what it ranks
            by.

    Raises:
        DopError: on a method beside a strategy, without its ratio, or one that cannot be so cheap.
    """

    def __init__(
        self,
        pretrained: str = "pocket",
        method: str | None = None,
        flops_ratio: float | None = None,
        data: str = "pocket",
        num_samples: int = 96,
        data_seed: int = 0,
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        if method is None:
            if flops_ratio is not None:
                raise DopError(f"`flops_ratio={flops_ratio}` is that of a `method`; name one, e.g. method=fastv")
            super().__init__(pretrained, **options)
            return
        if options.get("strategy") is not None or options.get("delta") is not None:
            raise DopError(f"`method={method}` and a strategy exclude each other; leave one of them out")
        selector = options.pop("selector", None)
        super().__init__(pretrained, **options)
        samples = validation_set(data, num_samples=int(num_samples), seed=int(data_seed))
        ratio = _ratio(method, flops_ratio)
        with fast_linear(self.loaded.model):  # as in dop-eval, so that both find the same
            self.strategy = fit(method, self.loaded, samples, flops_ratio=ratio, selector=selector, cache_dir=cache_dir)


class DopChatLmms(DopLmms, plain.DopChatLmms):
    """The same for tasks that say their messages themselves."""


def _ratio(method: str, given: float | None) -> float:
    if given is None and method != "full":
        raise DopError(f"`method={method}` is solved for a share of the full model's FLOPs; give flops_ratio=0.3")
    return 1.0 if given is None else float(given)

"""The verb: ``with pruned(model, strategy):``, and its in-place form ``prune_``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from dop_search.models.adapter import ModelAdapter
from dop_search.models.families import adapter_for
from dop_search.pruning.checks import UncalledModules, check_outputs
from dop_search.pruning.entry import Forward, Generate, Prefill
from dop_search.pruning.layer import parts_for
from dop_search.pruning.ranking import RankingSource
from dop_search.pruning.runtime import PrunedDecoder, explicit_rankings
from dop_search.pruning.stages import StagePlan
from dop_search.pruning.text_groups import TextGroups
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.utils.attached import Attached, refuse_copy, replace_attribute
from dop_search.utils.errors import DopError, StrategyError, UnsupportedModelError

_changing = threading.RLock()
"""Held while a model is pruned or restored, which several threads may try at once."""


class PruneHandle(Attached):
    """Undoes a :func:`prune_`. Restoring twice is harmless."""

    def __init__(self) -> None:
        self._undo = ExitStack()  # goes on where a step fails

    def replace(self, module: nn.Module, name: str, method: Any) -> None:
        """Give an instance a method of its own, with which it cannot be copied."""
        replace_attribute(self._undo, module, name, method)
        replace_attribute(self._undo, module, "__getstate__", refuse_copy)

    def on_restore(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` when the model is restored, the latest first."""
        self._undo.callback(undo)

    def restore(self) -> None:
        """Make the model what it was, all of it even where a step fails."""
        with _changing:
            self._undo.close()


def is_pruned(model: nn.Module) -> bool:
    """Whether the decoder of ``model`` belongs to a :func:`prune_` that was not undone."""
    return any(
        isinstance(getattr(vars(part).get("forward"), "__self__", None), PrunedDecoder) for part in model.modules()
    )


def check_strategy(adapter: ModelAdapter, strategy: Strategy) -> None:
    """Refuse a strategy that was made for another model.

    Raises:
        StrategyError: naming both sides and how to move a strategy.
        UnsupportedModelError: if it counts per image, which the model cannot.
    """
    num_layers = adapter.dims.num_layers
    if strategy.num_layers != num_layers:
        raise StrategyError(
            f"the strategy is for {strategy.num_layers} decoder layers, but the model has {num_layers}; "
            f"`strategy.for_num_layers({num_layers})` moves it by its depth ratios"
        )
    if strategy.model_fingerprint not in (None, adapter.fingerprint):
        raise StrategyError(
            f"the strategy was searched on {strategy.model_fingerprint!r}, but the model is {adapter.fingerprint!r}; "
            "search again, or use `dataclasses.replace(strategy, model_fingerprint=None)` to apply it all the same"
        )
    if strategy.per_image and not adapter.knows_images:
        raise UnsupportedModelError(
            f"{type(adapter.model).__name__} is handed the tiles of all images, and not which are of one, so that "
            "nothing can be counted per image; leave `per_image` False"
        )


def check_counts_sample(strategy: Strategy) -> None:
    """Refuse a strategy that counts per image, or by share, where the vision tower is to make so many tokens;
    StrategyError naming selectors that can."""
    if strategy.per_image or isinstance(strategy.num_visual_tokens, float):
        raise StrategyError(
            f"{strategy.selector!r} changes the vision tower for a number of tokens per sample, but the strategy keeps "
            f"{strategy.describe_tokens()}; give a number with per_image=False, or take another selector, such as "
            "divprune"
        )


def check_text(strategy: Strategy, text: TextGroups) -> None:
    """Refuse text groups that do not go with a strategy; StrategyError if they are for another number of layers, or the
    strategy ranks inside the decoder."""
    if not isinstance(text, TextGroups):
        raise StrategyError(f"`text` must be TextGroups, but got {text!r}")
    if text.num_layers != strategy.num_layers:
        raise StrategyError(f"`text` is for {text.num_layers} decoder layers, the strategy for {strategy.num_layers}")
    if strategy.stages:
        raise StrategyError(
            f"`text` does not go with a selector that ranks inside the decoder, as {strategy.selector!r} does; "
            "use one that ranks before it"
        )


def prune_(
    model: PreTrainedModel,
    strategy: Strategy,
    rankings: Sequence[np.ndarray] | None = None,
    compile: bool | str = False,
    text: TextGroups | None = None,
) -> PruneHandle:
    """Make ``model`` skip operations from now on, in place.

    Skipped operations are never computed: rows are gathered before the projections, and keys and values of skipped
    tokens never enter the cache. Text positions get the logits of the strategy; logits at visual positions mean
    nothing. The empty strategy leaves the model untouched.

    Args:
        model: a supported Hugging Face model.
        strategy: what runs.
        rankings: per sample of the batch the indices of its visual tokens, best first, instead of the strategy's
            selector.
        compile: run the decoder layers through ``torch.compile``, once for all layers, prompts and steps. Worth its
            start-up time where launching kernels is the bound: few tokens on a fast accelerator. A string names the
            backend.
        text: which operations of the prompt's text run; all of them by default. Logits at text that has left mean
            nothing; the last token of what is passed with the image always runs everything.

    Returns:
        A handle whose ``restore()`` undoes it.

    Raises:
        StrategyError: if the strategy does not fit the model.
        UnsupportedModelError: if the model's class has no adapter, or lacks what the selector needs.
        DopError: if the model is already pruned.
    """
    if not isinstance(strategy, Strategy):
        raise StrategyError(
            f"`strategy` must be a Strategy, but got {strategy!r}; read a file with `Strategy.load(...)`"
        )
    adapter = adapter_for(model)
    check_strategy(adapter, strategy)
    adapter.check_decoder()
    if text is not None:
        check_text(strategy, text)
    with _changing:
        if is_pruned(adapter.model):
            raise DopError(
                "the model is already pruned; leave the first `pruned(...)` context or call `restore()` first"
            )
        handle = PruneHandle()
        if strategy.is_empty and text is None:
            return handle
        check_outputs([adapter.model.config, adapter.text_config])
        if strategy.stages:
            adapter.check_plain_attention(f"selector {strategy.selector!r}")
        stages = StagePlan(strategy) if strategy.stages and rankings is None else None
        before = None if rankings is not None else strategy.ranked_before
        selector = None if before is None else make_selector(*before)
        uncalled = UncalledModules(adapter)
        if selector is not None and selector.changes_tower:
            check_counts_sample(strategy)
        count = None if isinstance(strategy.num_visual_tokens, float) else strategy.num_visual_tokens
        source = RankingSource(adapter, selector, explicit_rankings(rankings), count, strategy.per_image)
        handle.on_restore(source.close)
        decoder = PrunedDecoder(adapter, strategy, source, uncalled, parts_for(compile), stages, text)
        _attach(handle, adapter, decoder)
    return handle


def _attach(handle: PruneHandle, adapter: ModelAdapter, decoder: PrunedDecoder) -> None:
    with ExitStack() as undo:
        undo.callback(handle.restore)
        handle.on_restore(adapter.multimodal.register_forward_pre_hook(decoder.see_call, with_kwargs=True).remove)
        handle.replace(adapter.text_model, "forward", decoder.forward)
        whole: Any = adapter.model
        handle.replace(whole, "forward", Forward(decoder, whole.forward))
        if hasattr(whole, "generate"):
            handle.replace(whole, "generate", Generate(decoder, whole.generate))
        if hasattr(whole, "_prefill"):  # a method of transformers' own: without it chunked prefill is refused
            handle.replace(whole, "_prefill", Prefill(decoder, whole._prefill))
        undo.pop_all()


@contextmanager
def pruned(
    model: PreTrainedModel,
    strategy: Strategy,
    rankings: Sequence[np.ndarray] | None = None,
    compile: bool | str = False,
    text: TextGroups | None = None,
) -> Iterator[PreTrainedModel]:
    """Within the context ``model`` skips operations; on exit, also by an exception, it is what it was.

    See :func:`prune_` for arguments and errors.
    """
    handle = prune_(model, strategy, rankings, compile, text)
    try:
        yield model
    finally:
        handle.restore()

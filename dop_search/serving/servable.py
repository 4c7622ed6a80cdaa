"""Which strategies vLLM can serve, and the command that does. Knows nothing of vLLM."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from dop_search.selectors import SELECTORS, Selector, make_selector
from dop_search.strategy import Strategy
from dop_search.utils.errors import StrategyError

ARCHITECTURE = "DopLlavaForConditionalGeneration"
"""The name under which the plug-in registers its model class."""
SEEN = frozenset({"cls_attention", "received_attention", "global_attention", "features", "embeds", "tiles"})
"""What a selector can be shown of an image there (see ``SelectorInputs``)."""
_OF_TEXT = frozenset({"text", "text_embeds"})


def served_selector(strategy: Strategy) -> Selector:
    """The selector of a strategy that can be served.

    Raises:
        StrategyError: with the reason, and the selectors that can.
    """
    selector = make_selector(strategy.selector, strategy.selector_options)
    if (reason := _refusal(selector)) is None:
        return selector
    served = [name for name in sorted(SELECTORS) if _refusal(make_selector(name)) is None]
    raise StrategyError(
        f"selector {selector.name!r} cannot be served: {reason}; search again with selector=one of {', '.join(served)}"
    )


def _refusal(selector: Selector) -> str | None:
    needs = selector.needs()
    if needs & _OF_TEXT:
        return "it reads the prompt's text, but an engine encodes an image once, for all prompts"
    if selector.merges:
        return "it merges tokens"
    if selector.changes_tower:
        return "it changes what the vision tower computes"
    if needs - SEEN:
        return f"it needs {', '.join(sorted(needs - SEEN))} of the vision tower"
    return None


def keys_stay(strategy: Strategy) -> bool:
    """Whether all kept tokens are keys in every layer, so that an engine may share cached prefixes."""
    return all(len(policy.kv) == strategy.num_layers for policy in strategy.groups)


def check_servable(strategy: Strategy, num_layers: int | None = None, prefix_caching: bool = False) -> Selector:
    """The selector of a strategy that can be served.

    Args:
        strategy: the strategy.
        num_layers: decoder layers of the model, where known.
        prefix_caching: whether the engine shares cached prefixes.

    Raises:
        StrategyError: what cannot be served, and the remedy.
    """
    if num_layers is not None and strategy.num_layers != num_layers:
        raise StrategyError(
            f"the strategy is for {strategy.num_layers} decoder layers, but the model has {num_layers}; move it by "
            "`Strategy.for_num_layers`, or search on this model"
        )
    if strategy.stages:
        raise StrategyError(
            f"a strategy that ranks inside the decoder (stages={list(strategy.stages)}) cannot be served; search a "
            "space without stages, such as space=dop_split"
        )
    if strategy.num_visual_tokens == 0:
        raise StrategyError(
            "`num_visual_tokens >= 1` must hold to serve a strategy, but got 0; send text without images"
        )
    if prefix_caching and not keys_stay(strategy):
        raise StrategyError(
            "visual tokens leave the keys before the last layer, so that cached prefixes cannot be shared; start the "
            "engine with --no-enable-prefix-caching, or take a strategy with kv = num_layers"
        )
    return served_selector(strategy)


def serve_command(model: str, path: str | Path) -> str:
    """The command line that serves the strategy of a file.

    Raises:
        StrategyError: if the strategy cannot be served.
    """
    strategy = Strategy.load(path)
    check_servable(strategy)
    where = str(path) if ":/" in str(path) else str(Path(path).resolve())
    overrides = json.dumps({"architectures": [ARCHITECTURE], "dop_strategy": where})
    words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--hf-overrides", overrides]
    if not keys_stay(strategy):
        words.append("--no-enable-prefix-caching")
    if strategy.num_visual_tokens is not None:
        words += ["--limit-mm-per-prompt", json.dumps({"image": 1})]
    return shlex.join(words)

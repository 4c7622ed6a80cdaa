"""Which strategies vLLM can serve, and the command that does. Knows nothing of vLLM."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from dop_search.selectors import SELECTORS, Selector, make_selector
from dop_search.strategy import Strategy
from dop_search.utils.errors import StrategyError, UnsupportedModelError

ARCHITECTURES = {
    "llava": "DopLlavaForConditionalGeneration",
    "llava_next": "DopLlavaNextForConditionalGeneration",
    "qwen2_5_vl": "DopQwen2_5VLForConditionalGeneration",
}
"""By ``model_type`` the names under which the plug-in registers its model classes."""
_OF_CLIP = frozenset({"cls_attention", "received_attention", "global_attention", "features", "embeds", "tiles"})
SEEN = {"llava": _OF_CLIP, "llava_next": _OF_CLIP, "qwen2_5_vl": frozenset({"embeds", "tiles"})}
"""What a selector can be shown of an image there (see ``SelectorInputs``); of Qwen's tower what it returns, alone."""
_OF_TEXT = frozenset({"text", "text_embeds"})


def ranks(strategy: Strategy) -> bool:
    """Whether it matters which tokens of an image come first."""
    return strategy.num_visual_tokens is not None or len(strategy.groups) > 1


def served_selector(strategy: Strategy, model_type: str) -> Selector:
    """The selector of a strategy that can be served; StrategyError with the reason, and the selectors that can."""
    selector = make_selector(strategy.selector, strategy.selector_options)
    if not ranks(strategy) or (reason := _refusal(selector, model_type)) is None:
        return selector
    served = [name for name in sorted(SELECTORS) if _refusal(make_selector(name), model_type) is None]
    raise StrategyError(
        f"selector {selector.name!r} cannot be served: {reason}; search again with selector=one of {', '.join(served)}"
    )


def _refusal(selector: Selector, model_type: str) -> str | None:
    needs, seen = selector.needs(), SEEN[model_type]
    if needs & _OF_TEXT:
        return "it reads the prompt's text, but an engine encodes an image once, for all prompts"
    if selector.merges:
        return "it merges tokens"
    if selector.changes_tower:
        return "it changes what the vision tower computes"
    if needs - seen:
        return f"it needs {', '.join(sorted(needs - seen))} of the vision tower, which is not read there"
    return None


def keys_stay(strategy: Strategy) -> bool:
    """Whether all kept tokens are keys in every layer, so that an engine may share cached prefixes."""
    return all(len(policy.kv) == strategy.num_layers for policy in strategy.groups)


def counts_images(strategy: Strategy) -> bool:
    """Whether the strategy says of each image alone what enters and which group it is in."""
    return strategy.per_image or (strategy.num_visual_tokens is None and len(strategy.groups) == 1)


def check_servable(
    strategy: Strategy, num_layers: int | None = None, prefix_caching: bool = False, model_type: str = "llava"
) -> Selector:
    """The selector of a strategy that can be served; StrategyError what cannot be served, and the remedy.

    Args:
        num_layers: decoder layers of the model, where known.
        prefix_caching: whether the engine shares cached prefixes.
        model_type: of the model, one of :data:`ARCHITECTURES`.
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
    return served_selector(strategy, model_type)


def serve_command(model: str, path: str | Path) -> str:
    """The command line that serves the strategy of a file.

    Raises:
        StrategyError: if the strategy cannot be served.
        UnsupportedModelError: if models of that family cannot.
    """
    strategy = Strategy.load(path)
    model_type = _model_type(model, strategy)
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"models of type {model_type!r} are not served, only {', '.join(ARCHITECTURES)}; use `dop.pruned` of "
            "Hugging Face's model"
        )
    check_servable(strategy, model_type=model_type)
    where = str(path) if ":/" in str(path) else str(Path(path).resolve())
    overrides = json.dumps({"architectures": [ARCHITECTURES[model_type]], "dop_strategy": where})
    words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--hf-overrides", overrides]
    if not keys_stay(strategy):
        words.append("--no-enable-prefix-caching")
    if not counts_images(strategy):
        words += ["--limit-mm-per-prompt", json.dumps({"image": 1})]
    return shlex.join(words)


def _model_type(model: str, strategy: Strategy) -> str:
    """From the model's folder, or from the architecture that the strategy was searched on."""
    config = Path(model) / "config.json"
    if config.is_file():
        return str(json.loads(config.read_text(encoding="utf-8")).get("model_type"))
    if strategy.model_fingerprint is None:
        raise StrategyError(
            f"which family {model!r} is of can be seen neither from a folder of that name nor from the strategy's "
            "`model_fingerprint`; give a local folder as --model"
        )
    return strategy.model_fingerprint.rpartition("-")[0]

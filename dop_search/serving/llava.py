"""LLaVA in vLLM with the operations of a strategy: which tokens enter, and where each step's rows go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from dop_search.selectors import SelectorInputs
from dop_search.serving.checks import check_engine, check_prompt
from dop_search.serving.decoder import PrunedDecoder
from dop_search.serving.rows import NUM_MARKS, Fed, marks
from dop_search.serving.servable import check_servable
from dop_search.strategy import Strategy
from dop_search.utils.errors import StrategyError


@lru_cache(maxsize=8)
def _load(path: str) -> Strategy:
    return Strategy.load(path)


def strategy_of(hf_config: Any) -> Strategy:
    """The strategy that ``--hf-overrides`` names.

    Raises:
        StrategyError: if it names none.
    """
    path = getattr(hf_config, "dop_strategy", None)
    if path is None:
        raise StrategyError("no strategy is named; start vLLM with the line that `dop-serve STRATEGY.json` prints")
    return _load(path)


def _received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that keys receive, mean over heads and queries: ``[heads, queries or keys, dim]`` to ``[keys]``."""
    return (query @ key.mT * scale).float().softmax(dim=-1).mean(dim=(0, 1))


class Info(LlavaProcessingInfo):  # type: ignore[misc]
    """Tells vLLM how many tokens of an image there will be."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Of the tokens that the tower makes, those that enter the decoder."""
        return strategy_of(self.get_hf_config()).num_kept(self.num_encoded(image_width, image_height))

    def num_encoded(self, image_width: int, image_height: int) -> int:
        """The tokens that the tower makes."""
        return super().get_num_image_tokens(image_width=image_width, image_height=image_height)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """A count per sample is one of an image only where there is one image."""
        return {"image": None if strategy_of(self.get_hf_config()).num_visual_tokens is None else 1}


class Dummies(LlavaDummyInputsBuilder[Info]):  # type: ignore[misc]
    """Prompts that are used to measure memory: they end with text, as real ones have to."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """See base class."""
        text = super().get_dummy_text(mm_counts)
        return f"a{text}a" if text else text


class Processor(LlavaMultiModalProcessor):  # type: ignore[misc]
    """Refuses prompts that the strategy's model would not answer right."""

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """See base class.

        Raises:
            DopError: see :func:`check_prompt`.
        """
        result = super().apply(*args, **kwargs)
        size = self.info.get_image_size_with_most_features()
        dropped = self.info.num_encoded(size.width, size.height) - self.info.get_max_image_tokens()
        ranges = [(part.offset, part.length) for part in result["mm_placeholders"].get("image", [])]
        check_prompt(self.info.ctx.model_config, len(result["prompt_token_ids"]), ranges, dropped)
        return result


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class DopLlavaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA whose visual tokens run the operations of a strategy, and no others."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        check_engine(vllm_config, self)
        self.strategy = strategy_of(self.config)
        self.selector = check_servable(
            self.strategy, len(self.language_model.model.layers), bool(vllm_config.cache_config.enable_prefix_caching)
        )
        self.decoder = PrunedDecoder(self.language_model.model, self.strategy, vllm_config)
        self._heads: tuple[Tensor, Tensor] | None = None
        self._patches: Tensor | None = None
        self._fed: Fed | None = None
        self._attention().qkv_proj.register_forward_hook(self._see_heads)
        self.multi_modal_projector.register_forward_pre_hook(self._see_patches)

    # -- which tokens enter

    def _attention(self) -> Any:
        """Of the layer that feeds the projector, the last that vLLM builds."""
        return self.vision_tower.vision_model.encoder.layers[-1].self_attn

    def _see_heads(self, module: Any, args: Any, output: Any) -> None:
        query, key, _ = output[0].chunk(3, dim=-1)
        shape = (self._attention().num_heads_per_partition, self._attention().head_dim)
        self._heads = query.unflatten(-1, shape).transpose(1, 2), key.unflatten(-1, shape).transpose(1, 2)

    def _see_patches(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self._patches = args[0]

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """The kept tokens of each image, ``[kept, hidden_size + NUM_MARKS]``."""
        images = super().embed_multimodal(**kwargs)
        return [self._chosen(index, embeds) for index, embeds in enumerate(images)]

    def _chosen(self, image: int, embeds: Tensor) -> Tensor:
        ranking = self.selector.rank(self._shown(image, embeds), self.strategy.num_kept(len(embeds)))
        kept, channels = marks(self.strategy, ranking)
        rows = embeds[torch.from_numpy(kept).to(embeds.device)]
        return torch.cat([rows, torch.from_numpy(channels).to(rows)], dim=-1)

    def _shown(self, image: int, embeds: Tensor) -> SelectorInputs:
        assert self._heads is not None
        assert self._patches is not None
        query, key = (heads[image] for heads in self._heads)
        asking = {"cls_attention": slice(0, 1), "received_attention": slice(1, None), "global_attention": slice(None)}
        scores: dict[str, Any] = {
            name: _received(query[:, who], key, self._attention().scale)[1:]
            for name, who in asking.items()
            if name in self.selector.needs()
        }
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return SelectorInputs(len(embeds), ((side, side),), features=self._patches[image], embeds=embeds, **scores)

    # -- a step

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """See base class; remembers what the rows of the step are."""
        if multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            nothing = torch.zeros(0, NUM_MARKS, device=input_ids.device)
            self._fed = Fed.of(torch.zeros_like(input_ids, dtype=torch.bool), nothing)
            return super().embed_input_ids(input_ids)
        assert is_multimodal is not None
        channels = torch.cat([part[:, -NUM_MARKS:] for part in multimodal_embeddings])
        self._fed = Fed.of(is_multimodal.to(input_ids.device), channels)
        plain = [part[:, :-NUM_MARKS] for part in multimodal_embeddings]
        return super().embed_input_ids(input_ids, plain, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See base class: steps with visual tokens run in packed layers, the others in vLLM's own decoder."""
        fed, self._fed = self._fed, None
        context = get_forward_context()
        if context.attn_metadata is None or fed is None:  # measuring memory, compiling
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        rows = self.decoder.rows(fed, context)
        if rows.any_visual:
            assert inputs_embeds is not None
            hidden = self.decoder.run(inputs_embeds[: len(rows.place)], rows, context)
            return torch.nn.functional.pad(hidden, (0, 0, 0, len(positions) - len(hidden)))
        self.decoder.redirect(rows, context)
        positions = positions.clone()
        positions[: len(rows.positions)] = rows.positions
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    # -- weights

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """See base class."""
        loaded = super().load_weights(weights)
        self.decoder.keep_weights()
        return loaded

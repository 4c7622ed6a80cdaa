"""What models in vLLM with the operations of a strategy have in common: which tokens enter, where a step's rows go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from dop_search.selectors import SelectorInputs
from dop_search.serving.checks import check_engine, check_prompt
from dop_search.serving.decoder import PrunedDecoder
from dop_search.serving.rows import NUM_MARKS, Fed, Rows, marks
from dop_search.serving.servable import check_servable, counts_images, ranks
from dop_search.strategy import Strategy
from dop_search.utils.errors import StrategyError


@lru_cache(maxsize=8)
def _load(path: str) -> Strategy:
    return Strategy.load(path)


def strategy_of(hf_config: Any) -> Strategy:
    """The strategy that ``--hf-overrides`` names; StrategyError if it names none."""
    path = getattr(hf_config, "dop_strategy", None)
    if path is None:
        raise StrategyError("no strategy is named; start vLLM with the line that `dop-serve STRATEGY.json` prints")
    return _load(path)


class PrunedInfo:
    """Tells vLLM how many tokens of an image there will be. Stands before a family's own class."""

    def get_num_image_tokens(self, **image: Any) -> int:
        """Of the tokens that the tower makes, those that enter the decoder."""
        info: Any = self
        return strategy_of(info.get_hf_config()).num_kept(self.num_encoded(**image))

    def num_encoded(self, **image: Any) -> int:
        """The tokens that the tower makes."""
        family: Any = super()
        return int(family.get_num_image_tokens(**image))

    def get_image_size_with_most_features(self, **options: Any) -> Any:
        """The size with most tokens before any are dropped."""
        info: Any = self
        plain: Any = next(kind for kind in type(self).__mro__[1:] if kind.__module__.startswith("vllm."))
        return plain(info.ctx).get_image_size_with_most_features(**options)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """No more than one image where the strategy counts per sample; no videos."""
        info: Any = self
        return {"image": None if counts_images(strategy_of(info.get_hf_config())) else 1}


class PrunedDummies:
    """Prompts that are used to measure memory: they end with text, as real ones have to."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        family: Any = super()
        text = family.get_dummy_text(mm_counts)
        return f"a{text}a" if text else text


class PrunedProcessor:
    """Refuses prompts that the strategy's model would not answer right."""

    info: Any

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """See base class; raises what :func:`check_prompt` does."""
        family: Any = super()
        result = family.apply(inputs, *args, **kwargs)
        ranges = [(part.offset, part.length) for part in result["mm_placeholders"].get("image", [])]
        further = self.further_positions(result["mm_kwargs"].get("image", []), inputs, [size for _, size in ranges])
        check_prompt(self.info.ctx.model_config, len(result["prompt_token_ids"]), ranges, further)
        return result

    def further_positions(self, items: Sequence[Any], inputs: Any, kept: Sequence[int]) -> int:
        """How many more positions the images take than tokens: those that were dropped."""
        images = inputs.mm_data_items.get_items("image", object) if kept else None
        sizes = [images.get_image_size(index) for index in range(len(kept))] if images is not None else []
        encoded = (self.info.num_encoded(image_width=size.width, image_height=size.height) for size in sizes)
        return sum(encoded) - sum(kept)


class PrunedModel:
    """A model whose visual tokens run the operations of a strategy, and no others. Stands before a family's own class.

    Attributes:
        towers: classes of vision towers that selectors can be shown.
    """

    towers: tuple[type, ...] = ()
    num_marks = NUM_MARKS
    config: Any
    language_model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        check_engine(vllm_config, self.language_model.model)
        self.check_tower()
        self.strategy = strategy_of(self.config)
        self.selector = check_servable(
            self.strategy,
            len(self.language_model.model.layers),
            bool(vllm_config.cache_config.enable_prefix_caching),
            self.config.model_type,
        )
        self.decoder = PrunedDecoder(self.language_model.model, self.strategy, vllm_config)
        self._fed: Fed | None = None

    # -- which tokens enter

    def check_tower(self) -> None:
        """Refuse vision towers that selectors cannot be shown (``UnsupportedModelError``)."""
        raise NotImplementedError

    def shown(self, index: int, embeds: Tensor, image: Mapping[str, Any]) -> SelectorInputs:
        """What the selector sees of an image.

        Args:
            index: of the images that were encoded together.
            embeds: ``[n, hidden_size]`` its tokens.
            image: what vLLM has encoded the images from.
        """
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """The kept tokens of each image, ``[kept, hidden_size + num_marks]``."""
        family: Any = super()
        images = family.embed_multimodal(**kwargs)
        return [self._chosen(self.shown(index, embeds, kwargs), embeds) for index, embeds in enumerate(images)]

    def _chosen(self, seen: SelectorInputs, embeds: Tensor) -> Tensor:
        ranking = np.arange(len(embeds))
        if ranks(self.strategy):
            ranking = self.selector.rank(seen, self.strategy.num_kept(len(embeds)))
        kept, channels = marks(self.strategy, ranking)
        chosen = torch.from_numpy(kept).to(embeds.device)
        return torch.cat([embeds[chosen], torch.from_numpy(channels).to(embeds), self.places(seen, chosen)], dim=-1)

    def places(self, seen: SelectorInputs, kept: Tensor) -> Tensor:
        """What else a step has to know of kept tokens, ``[kept, num_marks - NUM_MARKS]``."""
        return torch.zeros(len(kept), 0, device=kept.device)

    # -- a step

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """See base class; remembers what the rows of the step are."""
        family: Any = super()
        if multimodal_embeddings is None or len(multimodal_embeddings) == 0:
            nothing = torch.zeros(0, self.num_marks, device=input_ids.device)
            self._fed = Fed.of(torch.zeros_like(input_ids, dtype=torch.bool), nothing)
            embeds: Tensor = family.embed_input_ids(input_ids)
            return embeds
        assert is_multimodal is not None
        channels = torch.cat([part[:, -self.num_marks :] for part in multimodal_embeddings])
        self._fed = Fed.of(is_multimodal.to(input_ids.device), channels)
        plain = [part[:, : -self.num_marks] for part in multimodal_embeddings]
        embeds = family.embed_input_ids(input_ids, plain, is_multimodal=is_multimodal)
        return embeds

    def positions(self, rows: Rows, given: Tensor) -> Tensor:
        """Positions of the step's rows, ``[…, n]``, from those that vLLM gives."""
        return rows.positions

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """See base class: steps with visual tokens run in packed layers, the others in vLLM's own decoder."""
        family: Any = super()
        fed, self._fed = self._fed, None
        context = get_forward_context()
        if context.attn_metadata is None or fed is None:  # measuring memory, compiling
            return family.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        rows = self.decoder.rows(fed, context)
        true = self.positions(rows, positions[..., : len(rows.place)])
        if rows.any_visual:
            assert inputs_embeds is not None
            hidden = self.decoder.run(inputs_embeds[: len(rows.place)], rows, true, context)
            return torch.nn.functional.pad(hidden, (0, 0, 0, positions.shape[-1] - len(hidden)))
        self.decoder.redirect(rows, context)
        positions = positions.clone()
        positions[..., : true.shape[-1]] = true
        return family.forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    # -- weights

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        family: Any = super()
        loaded: set[str] = family.load_weights(weights)
        self.decoder.keep_weights()
        return loaded

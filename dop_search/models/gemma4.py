"""Gemma 4, 31B and 26B-A4B: images of any size, pooled in the tower; windows, and layers with heads of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModelOutputWithPast, create_masks_for_vision_model

from dop_search.models.gemma3 import Gemma3Adapter
from dop_search.models.tower import Grids, VisionCall
from dop_search.models.vision import padded_square_means
from dop_search.strategy.operations import ModelDims, OtherHeads
from dop_search.utils.errors import UnsupportedModelError


class Gemma4Adapter(Gemma3Adapter):
    """``Gemma4ForConditionalGeneration`` without per-layer embeddings and without keys that layers share.

    Tokens of an image see each other within windows alone; layers that see everything have wider heads, fewer of them,
    and may make values by the projection of their keys.
    """

    token_types = "mm_token_type_ids"
    sees_images_in_windows = True
    draw_masks = staticmethod(create_masks_for_vision_model)
    decoder_output = Gemma4TextModelOutputWithPast

    @classmethod
    def check_config(cls, config: Any) -> None:
        text = config.get_text_config()
        found = [
            what
            for what, has in {
                f"num_kv_shared_layers={text.num_kv_shared_layers}": text.num_kv_shared_layers,
                f"hidden_size_per_layer_input={text.hidden_size_per_layer_input}": text.hidden_size_per_layer_input,
                "use_bidirectional_attention='all'": text.use_bidirectional_attention == "all",
            }.items()
            if has
        ]
        if found:
            raise UnsupportedModelError(
                f"this Gemma 4 has {', '.join(found)}: layers that share keys and values, or that read embeddings of "
                "their own, as E2B and E4B do, are not covered; take gemma-4-31B or gemma-4-26B-A4B"
            )

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.sees_images_whole = self.text_config.use_bidirectional_attention == "vision"

    @property
    def layer_config(self) -> Any:
        return self.text_config.per_layer_config[self.text_config.layer_types.index("sliding_attention")]

    @property
    def dims(self) -> ModelDims:
        """See base class; experts are beside an MLP, which has no gate."""
        text: Any = self.text_config
        others = tuple(index for index, kind in enumerate(text.layer_types) if kind == "full_attention")
        wide = text.per_layer_config[others[-1]]  # the last layer is always one of them
        heads = OtherHeads(others, wide.num_key_value_heads, wide.head_dim, text.attention_k_eq_v)
        dims = replace(super().dims, other_heads=heads)
        if text.enable_moe_block:
            dims = replace(
                dims,
                intermediate_size=text.moe_intermediate_size,
                num_experts=text.num_experts,
                active_experts=text.top_k_experts,
                shared_expert_size=text.intermediate_size,
                shared_expert_gate=False,
            )
        return dims

    @property
    def merge_size(self) -> int:
        return int(self.model.config.vision_config.pooling_kernel_size)

    def token_grids(self, call: VisionCall) -> list[Grids]:
        """See base class; each frame of a video is a grid. Places are (x, y), of padding -1."""
        places = call.arguments["image_position_ids" if call.modality == "image" else "video_position_ids"]
        sides = ((places.amax(dim=1) + 1) // self.merge_size).tolist()
        return [((rows, columns),) for columns, rows in sides]

    def to_token_order(self, values: Tensor) -> Tensor:
        """See base class; images are padded to the largest."""
        return padded_square_means(values, self.token_grids(self.vision_watch.current()), self.merge_size)

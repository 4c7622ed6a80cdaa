"""A family that this repository does not know, in one file: an adapter, a tiny model, its processor, every check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    LlamaConfig,
    PreTrainedModel,
)

from dop_search.models import FAMILIES, ModelAdapter
from dop_search.models.tower import Grids, VisionCall
from dop_search.testing.conformance import AdapterConformance
from dop_search.testing.models import randomize_
from dop_search.testing.sizes import IMAGE_TOKEN_ID, TinySizes
from dop_search.testing.tokenizer import chatml, square, tiny_tokenizer


class OutsideConfig(JanusConfig):
    """Somebody else's family: what Janus is, under a name that neither transformers nor this repository knows."""

    model_type = "outside"


class OutsideModel(JanusForConditionalGeneration):
    config_class = OutsideConfig


class OutsideAdapter(ModelAdapter):
    """As far as it reads images."""

    @property
    def vision_tower(self) -> Any:
        return self.model.model.vision_model

    def token_grids(self, call: VisionCall) -> list[Grids]:
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return [((side, side),)] * len(call.arguments["pixel_values"])

    def to_token_order(self, values: Tensor) -> Tensor:
        return values.flatten(0, 1)

    def received_attention_module(self) -> Any:
        return self.vision_tower.encoder.layers[-1].self_attn


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """What the module of such a family does when it is imported."""
    AutoConfig.register("outside", OutsideConfig)
    AutoModelForImageTextToText.register(OutsideConfig, OutsideModel)
    FAMILIES["outside"] = f"{__name__}:OutsideAdapter"
    yield
    del FAMILIES["outside"]


class TestOutsideFamily(AdapterConformance):
    def make_model(self, attn_implementation: str) -> PreTrainedModel:
        tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
        drawing = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32}
        config = OutsideConfig(
            text_config=LlamaConfig(**TinySizes().text()).to_dict(),
            vision_config={**tower, "image_size": 28, "patch_size": 7, "projection_dim": 32},
            vq_config={**drawing, "num_embeddings": 8, "projection_dim": 16, "image_token_embed_dim": 16},
            image_token_id=IMAGE_TOKEN_ID,
        )
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attn_implementation)
        randomize_(model, seed=0)
        model.generation_config.suppress_tokens = [IMAGE_TOKEN_ID]
        return model.eval()  # type: ignore[no-any-return]

    def make_processor(self) -> Any:
        return JanusProcessor(
            image_processor=JanusImageProcessor(size=square(28), min_size=7),
            tokenizer=tiny_tokenizer("<image>", boi_token="<img>", eoi_token="</img>"),
            num_image_tokens=16,
            chat_template=chatml("<image>", ""),
        )

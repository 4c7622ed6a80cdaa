"""The runtime against the masked dense reference, on every supported family."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from support.tiny_families import FIRST_OF_ADAPTERS, TINY_FAMILIES, tiny_processor
from support.tiny_models import tiny_model
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from dop_search.models import FAMILIES
from dop_search.testing.conformance import AdapterConformance, PruningConformance
from dop_search.testing.conformance.base import Models
from dop_search.testing.models import randomize_
from dop_search.testing.sizes import IMAGE_TOKEN_ID, NUM_SPECIAL_TOKENS


class Family(PruningConformance):
    """What is common to the tests of families whose decoders differ: every test."""

    __test__ = False
    model_type: ClassVar[str]
    max_examples = 2

    def make_model(self, attn_implementation: str) -> PreTrainedModel:
        return tiny_model(self.model_type, attn_implementation=attn_implementation)

    def make_processor(self) -> Any:
        return tiny_processor(self.model_type)

    def __init_subclass__(cls) -> None:
        cls.takes_videos = cls.model_type in TINY_FAMILIES and TINY_FAMILIES[cls.model_type].takes_videos


class TestLlava(Family):
    """Grouped-query attention, four layers; the others share its runtime and get fewer examples."""

    __test__ = True
    model_type = "llava"
    max_examples = 5


class TestLlavaNext(Family):
    """Any-resolution tiles and newline tokens."""

    __test__ = True
    model_type = "llava_next"


@pytest.mark.slow
class TestQwen2_5VL(Family):
    """Multimodal RoPE, dynamic resolution, windowed attention in the tower."""

    __test__ = True
    model_type = "qwen2_5_vl"


class TestQwen3VL(Family):
    """Multimodal RoPE, dynamic resolution, deepstack: features that enter after decoder layers 0 and 1."""

    __test__ = True
    model_type = "qwen3_vl"


class TestQwen3_5(Family):
    """Recurrent layers between those that attend, gated queries, half of each head rotated."""

    __test__ = True
    model_type = "qwen3_5"
    separates_packed_rows = False  # one recurrence runs through all of a row


class TestLfm2VL(Family):
    """Short convolutions between the layers that attend, other names."""

    __test__ = True
    model_type = "lfm2_vl"
    max_examples = 1
    separates_packed_rows = False


class TestGemma3(Family):
    """Windows shorter than an image, images that are seen as a whole, four norms, two rotations."""

    __test__ = True
    model_type = "gemma3"
    prefills_in_chunks = False
    separates_packed_rows = False


class TestGemma4(Family):
    """Images as a whole within windows alone, layers with other heads, experts beside MLPs, scaled layers."""

    __test__ = True
    model_type = "gemma4"
    max_examples = 1
    prefills_in_chunks = False
    separates_packed_rows = False


class TestContexts(Family):
    """A decoder that reads text alone: passages between markers in the place of images."""

    __test__ = True
    model_type = "llama"
    test_painted_patches_are_found_at_their_tokens = None  # type: ignore[assignment]  # nothing is painted

    def make_processor(self) -> Any:
        return None


class Sharing(AdapterConformance):
    """Families whose decoder layers are those of the families above: what is their own."""

    __test__ = False
    model_type: ClassVar[str]
    make_model, make_processor = Family.make_model, Family.make_processor


class SameAdapter(Sharing):
    """Families with the adapter of another, whose engine, packed rows and batches are that one's."""

    test_engine_equals_plain_pruned_forwards = None  # type: ignore[assignment]
    test_packed_rows_equal_singles = None  # type: ignore[assignment]
    test_a_ranking_does_not_depend_on_the_batch = None  # type: ignore[assignment]

    @pytest.mark.parametrize("kind", ["text_around", "several_images_one_last"])
    def test_prompts_equal_reference(self, models: Models, kind: str) -> None:
        super().test_prompts_equal_reference(models, kind)


WHOLE_SUITE = {test.model_type for test in Family.__subclasses__()}
for _name in [name for name in FAMILIES if name not in WHOLE_SUITE]:
    _fields = {"__test__": True, "model_type": _name, "takes_videos": TINY_FAMILIES[_name].takes_videos}
    # Ovis2 looks for its indicator tokens in chunks without an image; what timm's towers return cannot be sliced
    _fields["prefills_in_chunks"] = _name not in ("ovis2", "fast_vlm", "perception_lm")
    if _name.startswith("glm"):  # transformers 5.23 repeats image by image what beams need prompt by prompt
        _fields |= {"mixes_videos": False, "num_beams": 1}
    if _name in ("fast_vlm", "perception_lm", "aria"):
        _fields |= {"selector": "uniform_grid", "patches_have_places": _name != "aria"}
    if _name == "perception_lm":  # frames are encoded by the method for images, in the forward of each beam
        _fields |= {"mixes_videos": False, "num_beams": 1}
    if _name == "qwen3_5_moe" or _name.startswith("minicpm"):
        _fields["separates_packed_rows"] = False
        _fields["tolerance"] = 1e-4  # its recurrence counts in float32 even where the weights are float64
    _base = Sharing if _name in FIRST_OF_ADAPTERS else SameAdapter
    globals()[f"Test_{_name}"] = type(f"Test_{_name}", (_base,), _fields)


class WithBidirectionalPrefix(PruningConformance):
    """PaliGemma, whose prompt attends to all of itself: a decoder that pruned layers would compute otherwise.

    Its layers are of a known class, so nothing but the suite can tell.
    """

    __test__ = False

    def make_model(self, attn_implementation: str) -> PreTrainedModel:
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        vision = SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=28, patch_size=14)
        text = GemmaConfig(**sizes, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, vocab_size=99)
        config = PaliGemmaConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            image_token_id=IMAGE_TOKEN_ID,
            projection_dim=32,
            attn_implementation=attn_implementation,
        )
        model = PaliGemmaForConditionalGeneration(config)
        randomize_(model, seed=0)
        return model.eval()

    def make_sample(
        self,
        model: PreTrainedModel,
        num_text_before: int,
        num_text_after: int,
        seed: int,
        image_shape: int = 0,
        num_images: int = 1,
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(NUM_SPECIAL_TOKENS, 99, (num_text_before + num_text_after,), generator=generator)
        image = torch.full((4 * num_images,), IMAGE_TOKEN_ID)
        input_ids = torch.cat([text[:num_text_before], image, text[num_text_before:]])[None]
        pixels = torch.randn((num_images, 3, 28, 28), generator=generator)
        kinds = {"attention_mask": torch.ones_like(input_ids), "token_type_ids": torch.zeros_like(input_ids)}
        return {"input_ids": input_ids, **kinds, "pixel_values": pixels}


@pytest.mark.parametrize("kind", ["text_around", "image_first", "several_images"])
def test_a_decoder_that_is_not_causal_fails_the_suite(kind: str) -> None:
    suite = WithBidirectionalPrefix()
    with pytest.raises(AssertionError, match="the reference is not this model"):
        suite.test_reference_with_nothing_pruned_is_the_model(cache(suite.make_model), "sdpa", kind)

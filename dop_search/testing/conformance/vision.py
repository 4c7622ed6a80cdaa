"""What comes before the decoder: the patches of the tower end in the visual tokens that the adapter says."""

from __future__ import annotations

from typing import ClassVar

import pytest
from transformers import PreTrainedModel

from dop_search.models import adapter_for
from dop_search.models.tower import METHODS, Modality
from dop_search.testing.conformance.base import Models
from dop_search.testing.conformance.processing import ProcessingConformance
from dop_search.testing.painting import Canvas, canvas_of, check_painted_patches, vision_arguments
from dop_search.testing.reference import visual_positions


class VisionConformance(ProcessingConformance):
    """Painted patches."""

    def canvas(self, model: PreTrainedModel, modality: Modality = "image") -> Canvas:
        """Where the tower's patches can be painted; by default in front of a projector or merger of a known name."""
        return canvas_of(model, modality)

    patches_have_places: ClassVar[bool] = True
    """Whether visual tokens are made of patches of their own; those of resamplers are made of all."""

    @pytest.mark.parametrize("modality", ["image", "video"])
    def test_painted_patches_are_found_at_their_tokens(self, models: Models, modality: Modality) -> None:
        """Images of every shape, or a video: what is scored by patch stands at the tokens that the patch is part of."""
        if not self.patches_have_places:
            pytest.skip("every token is made of all patches")
        model = models("sdpa")
        if not hasattr(adapter_for(model).multimodal, METHODS[modality]):
            pytest.skip("frames of videos come as images")
        if self.processor() is not None:
            prompts = [self.drawn("sizes" if modality == "image" else "video")]
        elif modality == "video":
            pytest.skip("a family without a processor brings no videos")
        else:
            prompts = [self.make_sample(model, 3, 4, seed=n, image_shape=n, num_images=2) for n in range(3)]
        for prompt in prompts:
            arguments = vision_arguments(model, prompt, modality)
            num_tokens = check_painted_patches(model, self.canvas(model, modality), arguments, modality)
            assert 0 < num_tokens <= int(visual_positions(model, prompt["input_ids"]).sum())

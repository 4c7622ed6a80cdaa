"""What comes before the decoder: the patches of the tower end in the visual tokens that the adapter says."""

from __future__ import annotations

from transformers import PreTrainedModel

from dop_search.testing.conformance.base import ConformanceBase, Models
from dop_search.testing.painting import Canvas, canvas_of, check_painted_patches, vision_arguments
from dop_search.testing.reference import visual_positions


class VisionConformance(ConformanceBase):
    """Painted patches."""

    def canvas(self, model: PreTrainedModel) -> Canvas:
        """Where the tower's patches can be painted; by default in front of a projector or merger of a known name."""
        return canvas_of(model)

    def test_painted_patches_are_found_at_their_tokens(self, models: Models) -> None:
        """For every shape of image: what a selector scores by patch stands at the tokens that the patch is part of."""
        model = models("sdpa")
        for shape in range(3):
            sample = self.make_sample(model, 3, 4, seed=shape, image_shape=shape, num_images=2)
            num_tokens = check_painted_patches(model, self.canvas(model), vision_arguments(model, sample), seed=shape)
            assert 0 < num_tokens <= int(visual_positions(model, sample["input_ids"]).sum())

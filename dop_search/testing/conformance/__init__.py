"""The conformance suite: what must be true of a pruned model of any family.

Subclass it in a test module; pytest collects the inherited tests::

    from dop_search.testing.conformance import PruningConformance

    class TestMyFamily(PruningConformance):
        def make_model(self, attn_implementation):
            return MyModelForConditionalGeneration(...)          # tiny, random, evaluation mode, float32

        def make_sample(self, model, num_text_before, num_text_after, seed, image_shape=0, num_images=1):
            return {"input_ids": ..., "attention_mask": ..., "pixel_values": ...}   # batch of 1

The oracle is :mod:`dop_search.testing.reference`, which with nothing pruned must be the model itself. Logits are
compared at text positions and at each sample's last, the only ones at which a pruned model defines them.
"""

import pytest

PARTS = ("base", "prefill", "decoding", "skipping", "restoring", "vision", "scoring")
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in PARTS))

from dop_search.testing.conformance.decoding import DecodingConformance  # noqa: E402
from dop_search.testing.conformance.prefill import PrefillConformance  # noqa: E402
from dop_search.testing.conformance.restoring import RestoringConformance  # noqa: E402
from dop_search.testing.conformance.scoring import ScoringConformance  # noqa: E402
from dop_search.testing.conformance.skipping import SkippingConformance  # noqa: E402
from dop_search.testing.conformance.vision import VisionConformance  # noqa: E402


class PruningConformance(
    PrefillConformance,
    DecodingConformance,
    SkippingConformance,
    RestoringConformance,
    VisionConformance,
    ScoringConformance,
):
    """Every test of one model family. Override ``make_model``; ``make_sample`` and ``canvas`` if needed."""


__all__ = [
    "DecodingConformance",
    "PrefillConformance",
    "PruningConformance",
    "RestoringConformance",
    "ScoringConformance",
    "SkippingConformance",
    "VisionConformance",
]

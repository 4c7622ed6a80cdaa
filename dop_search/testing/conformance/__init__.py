"""The conformance suite: what must be true of a pruned model of any family.

Subclass it in a test module; pytest collects the inherited tests::

    from dop_search.testing.conformance import PruningConformance

    class TestMyFamily(PruningConformance):
        def make_model(self, attn_implementation):
            return MyModelForConditionalGeneration(...)          # tiny, random, evaluation mode, float32

        def make_sample(self, model, num_text_before, num_text_after, seed, image_shape=0):
            return {"input_ids": ..., "attention_mask": ..., "pixel_values": ...}   # batch of 1

The oracle is :mod:`dop_search.testing.reference`. Logits are compared at text positions, the only ones at which a
pruned model defines them.
"""

import pytest

pytest.register_assert_rewrite(
    "dop_search.testing.conformance.base",
    "dop_search.testing.conformance.prefill",
    "dop_search.testing.conformance.decoding",
    "dop_search.testing.conformance.skipping",
    "dop_search.testing.conformance.restoring",
)

from dop_search.testing.conformance.decoding import DecodingConformance  # noqa: E402
from dop_search.testing.conformance.prefill import PrefillConformance  # noqa: E402
from dop_search.testing.conformance.restoring import RestoringConformance  # noqa: E402
from dop_search.testing.conformance.skipping import SkippingConformance  # noqa: E402


class PruningConformance(PrefillConformance, DecodingConformance, SkippingConformance, RestoringConformance):
    """Every test of ``dop.pruned`` on one model family. Override ``make_model``, and ``make_sample`` if needed."""


__all__ = [
    "DecodingConformance",
    "PrefillConformance",
    "PruningConformance",
    "RestoringConformance",
    "SkippingConformance",
]

"""The conformance suite: what must be true of a pruned model of any family.

Subclass it in a test module; pytest collects the inherited tests::

    from dop_search.testing.conformance import PruningConformance

    class TestMyFamily(PruningConformance):
        def make_model(self, attn_implementation):
            return MyModelForConditionalGeneration(...)          # tiny, random, evaluation mode, float32

        def make_processor(self):
            return MyProcessor(...)                              # small images; its chat template places them

The oracle is :mod:`dop_search.testing.reference`, which with nothing pruned must be the model itself. Logits are
compared at text positions and at each sample's last, the only ones at which a pruned model defines them.
"""

import pytest

PARTS = ("base", "prefill", "decoding", "skipping", "restoring", "vision", "scoring", "processing")
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in PARTS))

import dop_search as dop  # noqa: E402
from dop_search.strategy import Strategy  # noqa: E402
from dop_search.testing.conformance.base import (  # noqa: E402
    Models,
    forward,
    generate,
    max_difference,
    max_text_difference,
    prompt_kinds,
)
from dop_search.testing.conformance.decoding import DecodingConformance, generate_arguments  # noqa: E402
from dop_search.testing.conformance.prefill import PrefillConformance  # noqa: E402
from dop_search.testing.conformance.restoring import RestoringConformance  # noqa: E402
from dop_search.testing.conformance.scoring import ScoringConformance  # noqa: E402
from dop_search.testing.conformance.skipping import SkippingConformance  # noqa: E402
from dop_search.testing.conformance.vision import VisionConformance  # noqa: E402
from dop_search.testing.reference import masked_forward  # noqa: E402


class PruningConformance(
    PrefillConformance,
    DecodingConformance,
    SkippingConformance,
    RestoringConformance,
    VisionConformance,
    ScoringConformance,
):
    """Every test of one model family. Override ``make_model`` and ``make_processor``; ``canvas`` if needed."""


class AdapterConformance(SkippingConformance, VisionConformance):
    """What an adapter can get wrong, for families whose decoder layers another family has put to every test.

    The same to override as for :class:`PruningConformance`, at a fraction of its time.
    """

    max_examples = 1
    test_packed_rows_equal_singles = PrefillConformance.test_packed_rows_equal_singles

    @prompt_kinds
    def test_prompts_equal_reference(self, models: Models, kind: str) -> None:
        """The reference is the model; a pruned forward is the reference, and so is a prefill in chunks."""
        model = models("sdpa")
        inputs, layers = self.prompts(model, kind), self.num_layers(model)
        rankings, real = self.rankings(model, inputs), inputs["attention_mask"].bool()
        full = forward(model, inputs)
        everything = masked_forward(model, inputs, Strategy.full(layers, selector="explicit"), rankings)
        assert max_difference(everything[real], full[real]) <= self.tolerance, "the reference is not this model"
        for name in ("layer_sets", "half_of_the_tokens"):
            strategy = self.corner(name, model, inputs)
            expected = self.check_forward(model, inputs, strategy, rankings)
            with dop.pruned(model, strategy, rankings=rankings):
                chunk = 8 if self.prefills_in_chunks else None
                arguments = {**generate_arguments(model), "max_new_tokens": 1, "min_new_tokens": 1}
                output = generate(model, **inputs, **arguments, do_sample=False, prefill_chunk_size=chunk)
            assert max_text_difference(model, inputs, expected, full) > 500 * self.tolerance
            assert max_difference(output.logits[0], expected[:, -1]) <= self.tolerance


__all__ = ["AdapterConformance", "PruningConformance"]

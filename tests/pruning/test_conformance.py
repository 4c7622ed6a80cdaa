"""The runtime against the masked dense reference, on every supported family."""

from __future__ import annotations

from transformers import PreTrainedModel

from dop_search.models import FAMILIES
from dop_search.testing.conformance import PruningConformance
from dop_search.testing.models import tiny_llava


class TestLlava(PruningConformance):
    """Grouped-query attention, four layers."""

    def make_model(self, attn_implementation: str) -> PreTrainedModel:
        return tiny_llava(attn_implementation=attn_implementation)


FAMILY_TESTS = {"llava": TestLlava}


def test_every_family_is_tested() -> None:
    assert set(FAMILY_TESTS) == set(FAMILIES)

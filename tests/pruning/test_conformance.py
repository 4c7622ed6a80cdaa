"""The runtime against the masked dense reference, on every supported family."""

from __future__ import annotations

from typing import ClassVar

import pytest
from transformers import PreTrainedModel

from dop_search.models import FAMILIES
from dop_search.testing.conformance import PruningConformance
from dop_search.testing.models import tiny_model


class Family(PruningConformance):
    """What is common to the tests of all families."""

    __test__ = False
    model_type: ClassVar[str]
    max_examples = 4

    def make_model(self, attn_implementation: str) -> PreTrainedModel:
        return tiny_model(self.model_type, attn_implementation=attn_implementation)


class TestLlava(Family):
    """Grouped-query attention, four layers; the others share its runtime and get fewer examples."""

    __test__ = True
    model_type = "llava"
    max_examples = 15


@pytest.mark.slow
class TestLlavaNext(Family):
    """Any-resolution tiles and newline tokens."""

    __test__ = True
    model_type = "llava_next"


@pytest.mark.slow
class TestLlavaOnevision(Family):
    """SigLIP tower, Qwen2 decoder."""

    __test__ = True
    model_type = "llava_onevision"


@pytest.mark.slow
class TestQwen2VL(Family):
    """Multimodal RoPE, dynamic resolution."""

    __test__ = True
    model_type = "qwen2_vl"


class TestQwen2_5VL(Family):
    """Windowed attention in the tower."""

    __test__ = True
    model_type = "qwen2_5_vl"


class TestQwen3VL(Family):
    """Deepstack: features that enter behind decoder layers 0 and 1."""

    __test__ = True
    model_type = "qwen3_vl"


class TestInternVL(Family):
    """Tiles of an image without a separator."""

    __test__ = True
    model_type = "internvl"


FAMILY_TESTS: dict[str, type[Family]] = {
    test.model_type: test
    for test in (
        TestLlava,
        TestLlavaNext,
        TestLlavaOnevision,
        TestQwen2VL,
        TestQwen2_5VL,
        TestQwen3VL,
        TestInternVL,
    )
}


def test_every_family_is_tested() -> None:
    assert set(FAMILY_TESTS) == set(FAMILIES)

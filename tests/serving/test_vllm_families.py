"""LLaVA-NeXT and Qwen2.5-VL in vLLM: tiny random models, images of many sizes, several images per prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tests/serving/environment.sh")

from support import vllm_engine as serving
from support.tiny_families import TINY_FAMILIES
from support.vllm_engine import Engine, Question
from transformers import AutoModelForImageTextToText

import dop_search as dop
from dop_search.models.prompts import chat_prompt
from dop_search.testing.models import randomize_
from dop_search.testing.sizes import TinySizes

NUM_LAYERS = 4
CLOSE = 2e-6
"""Nats, as for LLaVA."""
SIZES = ((56, 40), (30, 70), (50, 50), (29, 28), (28, 90))
SELECTORS = {
    "llava_next": ["cls_attention", "scope", "uniform_grid", "received_attention", "holov"],
    "qwen2_5_vl": ["divprune", "uniform_grid", "random"],
}


class Family:
    """A model of a family in vLLM and in Hugging Face's library."""

    def __init__(self, name: str, folder: Path) -> None:
        sizes = TinySizes(hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
        model = AutoModelForImageTextToText.from_config(TINY_FAMILIES[name].config(name, sizes))
        randomize_(model, seed=0)
        model.save_pretrained(folder)
        TINY_FAMILIES[name].processor().save_pretrained(folder)
        self.name, self.reference = name, dop.load(str(folder), dtype="float32")
        self.engine = Engine(folder, folder, NUM_LAYERS, max_model_len=512, limit_mm_per_prompt={"image": 2})
        self.rng = np.random.default_rng(0)

    def image(self) -> Image.Image:
        """No two patches alike: where scores agree up to rounding, selectors may take either token."""
        width, height = SIZES[int(self.rng.integers(len(SIZES)))]
        return Image.fromarray(self.rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    def questions(self, count: int, num_images: int = 1) -> list[Question]:
        texts = ["What is this?", "How many?", "Is the circle left of the square?"]
        processor = self.reference.processor
        return [
            Question(chat_prompt(processor, texts[n % 3], num_images, 0), [self.image() for _ in range(num_images)])
            for n in range(count)
        ]

    def check(self, strategy: dop.Strategy, questions: list[Question]) -> None:
        self.engine.use(strategy)
        for question, answer in zip(questions, self.engine.ask(questions), strict=True):
            true = serving.expected(self.reference, strategy, question)
            kl = serving.divergence(true, answer)
            assert abs(kl) < CLOSE, f"{strategy.describe()} {[image.size for image in question.images]}: {kl}"


@pytest.fixture(scope="module", params=SELECTORS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    made = Family(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.engine.llm.llm_engine.engine_core.shutdown()


def random_strategy(family: Family, seed: int) -> dop.Strategy:
    """Exit depths or any layers, one or two groups, counted per image: all tokens, some, or a share."""
    rng = np.random.default_rng(seed)
    shares = [[1.0], [0.3, 0.7]][int(rng.integers(2))]
    names = SELECTORS[family.name]
    count = [None, int(rng.integers(1, 20)), float(rng.uniform(0.1, 0.9))][seed % 3]
    fields: dict[str, Any] = {"num_visual_tokens": count, "selector": names[seed % len(names)], "per_image": True}
    if rng.integers(3) == 0:
        return dop.Strategy.from_array(rng.random((len(shares), NUM_LAYERS, 3)) < 0.6, shares, **fields)
    depths = {name: rng.integers(0, NUM_LAYERS + 1, len(shares)).tolist() for name in ("q", "kv", "mlp")}
    return dop.Strategy.depthwise(NUM_LAYERS, **depths, shares=shares, **fields)


def test_the_full_strategy_is_the_plain_model(family: Family) -> None:
    family.engine.chunks(None)
    family.check(dop.Strategy.full(NUM_LAYERS), [*family.questions(3), *family.questions(2, num_images=2)])


@pytest.mark.parametrize("seed", range(12))
def test_random_strategies(family: Family, seed: int) -> None:
    """Prompts of one image and of two in one batch; every other time in steps of 9 rows, which cut images."""
    family.engine.chunks(9 if seed % 2 else None)
    family.check(random_strategy(family, seed), [*family.questions(2), *family.questions(2, num_images=2)])


def test_a_wrong_strategy_is_noticed(family: Family) -> None:
    """The comparison can fail: one token more is another answer."""
    first = dop.Strategy.depthwise(NUM_LAYERS, 2, 4, 1, 5, selector="uniform_grid", per_image=True)
    second = dop.Strategy.depthwise(NUM_LAYERS, 2, 4, 1, 6, selector="uniform_grid", per_image=True)
    family.engine.chunks(None)
    family.engine.use(first)
    question = family.questions(1)[0]
    answer = family.engine.ask([question])[0]
    assert serving.divergence(serving.expected(family.reference, second, question), answer) > 100 * CLOSE


def test_long_answers(family: Family) -> None:
    """Positions go on where those of the dropped tokens end."""
    strategy = dop.Strategy.depthwise(NUM_LAYERS, 3, 4, 1, 0.5, selector="uniform_grid", per_image=True)
    family.engine.use(strategy)
    questions = family.questions(6, num_images=2)
    for question, answer in zip(questions, family.engine.ask(questions, num_tokens=12), strict=True):
        true = serving.expected(family.reference, strategy, question, num_tokens=12)
        assert abs(serving.divergence(true, answer)) < CLOSE

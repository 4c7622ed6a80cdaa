"""vLLM with a strategy says what the pruned Hugging Face model says: whole next-token distributions.

Needs an environment with vLLM (``environment.sh``); one engine serves all tests.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tests/serving/environment.sh")

from support import vllm_engine as serving
from support.vllm_engine import NUM_LAYERS, Engine, Question

import dop_search as dop
from dop_search.utils.errors import DopError

CLOSE = 2e-6
"""Nats. Log-probabilities come in float32, which leaves 1e-7."""
SELECTORS = ["cls_attention", "divprune", "uniform_grid", "received_attention", "scope", "random"]
"""Not VisPruner, whose choice changes where attention agrees up to rounding; it has a test of its own."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """64 blocks of 32 tokens: room for seven whole prompts."""
    made = Engine(
        tmp_path_factory.mktemp("serving"), block_size=32, num_gpu_blocks_override=64, enable_prefix_caching=True
    )
    yield made
    made.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def reference() -> Any:
    return dop.load("pocket")


class Pictures:
    """Questions about pictures that no other question has."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def image(self) -> Image.Image:
        image = Image.new("RGB", (96, 96), tuple(self.rng.integers(0, 256, 3).tolist()))
        draw = ImageDraw.Draw(image)
        for _ in range(6):
            x, y, size = self.rng.integers(0, 72, 2).tolist() + self.rng.integers(6, 24, 1).tolist()
            draw.ellipse((x, y, x + size, y + size), fill=tuple(self.rng.integers(0, 256, 3).tolist()))
        # No two patches alike: where scores agree up to rounding, selectors may take either token.
        noise = self.rng.integers(0, 64, (96, 96, 3), dtype=np.uint8)
        return Image.fromarray(np.asarray(image) // 2 + 2 * noise)

    def questions(self, count: int, num_images: int = 1) -> list[Question]:
        texts = ["What is this?", "How many circles are there in the picture?", "Is the circle left of the square?"]
        return [
            Question(
                "USER: " + "".join(f"<image>\n{i} " for i in range(num_images)) + f"{texts[n % 3]} ASSISTANT:",
                [self.image() for _ in range(num_images)],
            )
            for n in range(count)
        ]


PICTURES = Pictures()


def random_strategy(seed: int) -> dop.Strategy:
    """Exit depths or any layers, one or two groups, any served selector, some or all tokens."""
    rng = np.random.default_rng(seed)
    shares = [[1.0], [0.3, 0.7]][int(rng.integers(2))]
    num_tokens = [None, int(rng.integers(1, 257))][int(rng.integers(2))]
    fields: dict[str, Any] = {"num_visual_tokens": num_tokens, "selector": SELECTORS[seed % len(SELECTORS)]}
    if rng.integers(3) == 0:
        runs = rng.random((len(shares), NUM_LAYERS, 3)) < 0.6
        return dop.Strategy.from_array(runs, shares, **fields)
    depths = {name: rng.integers(0, NUM_LAYERS + 1, len(shares)).tolist() for name in ("q", "kv", "mlp")}
    return dop.Strategy.depthwise(NUM_LAYERS, **depths, shares=shares, **fields)


def check(engine: Engine, reference: Any, strategy: dop.Strategy, questions: list[Question]) -> None:
    engine.use(strategy)
    found = engine.ask(questions)
    for question, answer in zip(questions, found, strict=True):
        kl = serving.divergence(serving.expected(reference, strategy, question), answer)
        assert abs(kl) < CLOSE, f"{strategy.describe()}: {kl}"


def test_the_full_strategy_is_the_plain_model(engine: Engine, reference: Any) -> None:
    check(engine, reference, dop.Strategy.full(NUM_LAYERS), PICTURES.questions(3))


@pytest.mark.parametrize("seed", range(18))
def test_random_strategies(engine: Engine, reference: Any, seed: int) -> None:
    """Three questions in one batch; every other time in steps of 48 rows, which cut images."""
    engine.chunks(48 if seed % 2 else None)
    check(engine, reference, random_strategy(seed), PICTURES.questions(3))


def test_the_tokens_of_a_selector_that_rounding_changes(engine: Engine, reference: Any) -> None:
    """What VisPruner chose in vLLM, given to Hugging Face's model as a ranking."""
    engine.chunks(None)
    strategy = dop.Strategy.depthwise(NUM_LAYERS, 5, 11, 2, 100, selector="vispruner")
    engine.use(strategy)
    question, selector, chosen = PICTURES.questions(1)[0], engine.model.selector, []
    engine.model.selector = SimpleNamespace(
        needs=selector.needs, rank=lambda *seen: chosen.append(selector.rank(*seen)) or chosen[-1]
    )
    answer = engine.ask([question])[0]
    assert len(np.unique(chosen[0])) == 256
    true = serving.expected(reference, strategy, question, rankings=chosen)
    assert abs(serving.divergence(true, answer)) < CLOSE


def test_a_wrong_strategy_is_noticed(engine: Engine, reference: Any) -> None:
    """The comparison can fail: the answers of another strategy are not those of this one."""
    strategy, question = dop.Strategy.depthwise(NUM_LAYERS, 2, 3, 1, 40), PICTURES.questions(1)[0]
    engine.use(strategy)
    answer = engine.ask([question])[0]
    others = [dop.Strategy.depthwise(NUM_LAYERS, 2, 3, 1, 42), dop.Strategy.depthwise(NUM_LAYERS, 2, 4, 1, 40)]
    for other in others:
        assert serving.divergence(serving.expected(reference, other, question), answer) > 100 * CLOSE


@pytest.mark.parametrize("size", [1, 7, 48, None])
def test_steps_of_any_size(engine: Engine, reference: Any, size: int | None) -> None:
    engine.chunks(size)
    check(engine, reference, dop.Strategy.depthwise(NUM_LAYERS, 5, 11, 2, 60), PICTURES.questions(2))


@pytest.mark.parametrize(
    "strategy",
    [
        dop.Strategy.depthwise(NUM_LAYERS, 5, 10, 2),
        dop.Strategy.depthwise(NUM_LAYERS, [7, 3], [12, 10], [4, 2], 100, [0.3, 0.7], per_image=True),
    ],
    ids=lambda strategy: strategy.describe(),
)
def test_two_images(engine: Engine, reference: Any, strategy: dop.Strategy) -> None:
    engine.chunks(100)
    check(engine, reference, strategy, PICTURES.questions(2, num_images=2))


def test_requests_that_are_interrupted_and_fed_again(engine: Engine, reference: Any) -> None:
    """More requests than the cache has room for while they grow."""
    engine.chunks(None)
    strategy = dop.Strategy.depthwise(NUM_LAYERS, 5, 11, 2, 60)
    engine.use(strategy)
    questions = PICTURES.questions(16)
    interrupted = engine.count_interruptions()
    found = engine.ask(questions, num_tokens=60)
    assert interrupted() > 0
    for question, answer in zip(questions[::4], found[::4], strict=True):
        true = serving.expected(reference, strategy, question, num_tokens=60)
        assert abs(serving.divergence(true, answer)) < CLOSE


def test_cached_prefixes_are_shared(engine: Engine, reference: Any) -> None:
    """Keys to the last layer: one image, five questions, in one step and in a later one."""
    strategy = dop.Strategy.depthwise(NUM_LAYERS, 4, NUM_LAYERS, 2, 200)
    engine.chunks(None)
    engine.use(strategy)
    image = PICTURES.image()
    texts = ["What is this?", "How many?", "Where is the circle?", "What colour is the circle in the picture?", "Why?"]
    questions = [Question(f"USER: <image>\n{text} ASSISTANT:", [image]) for text in texts]
    hits = engine.count_cached_tokens()
    found = [*engine.ask(questions[:3]), *engine.ask(questions[3:])]
    assert hits() >= 4 * 192
    for question, answer in zip(questions, found, strict=True):
        assert abs(serving.divergence(serving.expected(reference, strategy, question), answer)) < CLOSE


def test_two_hundred_requests_at_once_are_answered_as_if_alone(engine: Engine) -> None:
    engine.chunks(None)
    engine.use(dop.Strategy.depthwise(NUM_LAYERS, 3, 11, 1, 48))
    questions = PICTURES.questions(200)
    together = engine.ask(questions, num_tokens=3)
    engine.forget()
    alone = [engine.ask([question], num_tokens=3)[0] for question in questions]
    largest = max(abs(serving.divergence(one, many)) for one, many in zip(alone, together, strict=True))
    assert largest < CLOSE
    assert len(collections.Counter(tuple(answer.logprobs[0].round(decimals=4).tolist()) for answer in alone)) > 190


def test_a_prompt_that_ends_with_an_image_is_refused(engine: Engine) -> None:
    engine.use(dop.Strategy.full(NUM_LAYERS))
    with pytest.raises(DopError, match="must begin and end with text"):
        engine.ask([Question("USER: <image>", [PICTURES.image()])])


def test_positions_that_the_model_does_not_have_are_refused(engine: Engine) -> None:
    """640 + 400 dropped tokens do not fit 1024 positions."""
    engine.use(dop.Strategy.full(NUM_LAYERS, num_visual_tokens=1))
    config = engine.llm.llm_engine.model_config
    before, config.max_model_len = config.max_model_len, 800
    try:
        with pytest.raises(DopError, match="--max-model-len 769"):
            engine.ask(PICTURES.questions(1))
    finally:
        config.max_model_len = before


def test_a_model_without_a_strategy_is_refused() -> None:
    from dop_search.serving.model import strategy_of

    with pytest.raises(DopError, match="dop-serve"):
        strategy_of(SimpleNamespace())

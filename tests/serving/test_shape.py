"""A random model in the shape of LLaVA-1.5 in vLLM: 576 tokens, the tower's last layer but one; and grouped heads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tests/serving/environment.sh")

from support import vllm_engine as serving
from support.vllm_engine import Engine, Question

import dop_search as dop
from experiments.serving.model import save_random_llava

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_llava(tmp_path_factory.mktemp("model"), NUM_LAYERS, hidden_size=128, num_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    made = Engine(tmp_path_factory.mktemp("serving"), model, NUM_LAYERS, max_model_len=1024)
    yield made
    made.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    return dop.load(str(model))


@pytest.mark.parametrize(
    "strategy",
    [
        dop.Strategy.full(NUM_LAYERS),
        dop.Strategy.depthwise(NUM_LAYERS, 2, 3, 1, 300),
        dop.Strategy.depthwise(NUM_LAYERS, [3, 1], [4, 2], [2, 1], 500, [0.25, 0.75], selector="received_attention"),
    ],
    ids=lambda strategy: strategy.describe(),
)
def test_a_model_of_that_shape(engine: Engine, reference: Any, strategy: dop.Strategy) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)) for _ in range(2)]
    questions = [Question("USER: <image>\nWhat is this? ASSISTANT:", [image]) for image in images]
    engine.use(strategy)
    engine.chunks(200)
    for question, answer in zip(questions, engine.ask(questions), strict=True):
        true = serving.expected(reference, strategy, question)
        assert abs(serving.divergence(true, answer)) < 1e-5

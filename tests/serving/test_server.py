"""The line that ``dop-serve`` prints, run: an OpenAI-compatible server, with compiled decoding."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("vllm", reason="vLLM has an environment of its own: tests/serving/environment.sh")

from support.vllm_engine import NUM_LAYERS, Question, expected

import dop_search as dop
from dop_search.models.pocket import pocket_path
from dop_search.serving.servable import serve_command

STRATEGY = dop.Strategy.depthwise(NUM_LAYERS, q=5, kv=11, mlp=2, num_visual_tokens=60)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    STRATEGY.save(folder / "strategy.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = serve_command(str(pocket_path()), folder / "strategy.json")
    command = [sys.executable, *shlex.split(printed)[1:], "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "640"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1800):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=120)
        except subprocess.TimeoutExpired:
            server.kill()


def ask(address: str, images: list[Image.Image], question: str) -> Any:
    """The first choice of a chat completion, with the log-probabilities of the likeliest tokens."""
    content: list[Any] = [{"type": "image_url", "image_url": {"url": as_url(image)}} for image in images]
    content.append({"type": "text", "text": question})
    with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 4}
    body |= {"logprobs": True, "top_logprobs": 20, "return_token_ids": True, "ignore_eos": True}
    body["add_special_tokens"] = True  # the chat template has no first token, and the server adds none by itself
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]


def as_url(image: Image.Image) -> str:
    png = io.BytesIO()
    image.save(png, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def test_answers_are_those_of_the_pruned_model(address: str) -> None:
    loaded = dop.load("pocket")
    for sample in dop.validation_set("pocket", num_samples=6, seed=1).samples:
        image = sample.image.convert("RGB")
        found = ask(address, [image], sample.question)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
        text = loaded.processor.apply_chat_template([message], add_generation_prompt=True)
        true = expected(loaded, STRATEGY, Question(text, [image]))
        assert found["token_ids"] == true.tokens
        for step, logprobs in zip(found["logprobs"]["content"], true.logprobs, strict=True):
            likeliest = torch.tensor([item["logprob"] for item in step["top_logprobs"]])
            assert torch.allclose(likeliest, logprobs.topk(len(likeliest)).values.float(), atol=2e-3)


def test_a_second_image_is_refused(address: str) -> None:
    """`num_visual_tokens` counts per sample, an engine per image."""
    image = Image.new("RGB", (96, 96), (255, 255, 255))
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(address, [image, image], "What is this?")
    assert error.value.code == 400
    assert "1 image" in error.value.read().decode()

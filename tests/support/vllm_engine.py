"""One vLLM engine for many strategies, and the answers that the pruned Hugging Face model gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

import dop_search as dop
from dop_search.models.pocket import pocket_path
from dop_search.serving.decoder import PrunedDecoder
from dop_search.serving.model import _load
from dop_search.serving.servable import ARCHITECTURES, check_servable

NUM_LAYERS = 12
NO_TOKEN = 1_000_000
"""No answer ends before it is as long as it was asked for."""


@dataclass
class Question:
    """Text with a placeholder per image, and the images."""

    text: str
    images: Sequence[Image.Image]


class Engine:
    """A model in vLLM; ``use`` exchanges the strategy, so that one start serves a whole file of tests."""

    def __init__(self, folder: Path, model: Path | None = None, num_layers: int = NUM_LAYERS, **options: Any) -> None:
        from vllm import LLM

        self.num_layers = num_layers
        self.file = folder / "strategy.json"
        dop.Strategy.depthwise(num_layers, q=0, kv=num_layers, mlp=0).save(self.file)  # keeps all split weights
        family = AutoConfig.from_pretrained(model or pocket_path()).model_type
        overrides = {"architectures": [ARCHITECTURES[family]], "dop_strategy": str(self.file)}
        defaults = {"max_model_len": 640, "enforce_eager": True, "enable_prefix_caching": False}
        self.llm = LLM(
            str(model or pocket_path()),
            hf_overrides=overrides,
            dtype="float32",
            max_logprobs=-1,
            disable_log_stats=True,
            mm_processor_cache_gb=0,
            **(defaults | options),
        )
        self.model = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        self.weights = dict(self.model.decoder._split)

    def use(self, strategy: dop.Strategy) -> None:
        """Serve another strategy from now on; what was encoded before is forgotten."""
        strategy.save(self.file)
        _load.cache_clear()
        model = self.model
        model.strategy = strategy
        model.selector = check_servable(strategy, self.num_layers, model_type=model.config.model_type)
        old = model.decoder
        model.decoder = PrunedDecoder(old.decoder, strategy, old.vllm_config)
        model.decoder._split = {i: self.weights[i] for i, step in enumerate(model.decoder.steps) if step.q != step.kv}
        self.forget()

    def forget(self) -> None:
        """Nothing that was encoded or cached is used again."""
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.llm_engine.reset_prefix_cache()

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def chunks(self, size: int | None) -> None:
        """Feed no more rows than this in a step; ``None``: as many as the engine was made for."""
        self.scheduler.max_num_scheduled_tokens = size or self.scheduler.scheduler_config.max_num_batched_tokens

    def count_interruptions(self) -> Callable[[], int]:
        """How many requests lose their place from now on."""
        scheduler, count = self.scheduler, [0]
        interrupt = type(scheduler)._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return interrupt(scheduler, *args, **kwargs)

        scheduler._preempt_request = counted
        return lambda: count[0]

    def count_cached_tokens(self) -> Callable[[], int]:
        """How many tokens are not computed from now on, since a prefix was."""
        manager, count = self.scheduler.kv_cache_manager, [0]
        find = type(manager).get_computed_blocks

        def counted(request: Any) -> Any:
            found = find(manager, request)
            count[0] += found[1]
            return found

        manager.get_computed_blocks = counted
        return lambda: count[0]

    def ask(self, questions: Sequence[Question], num_tokens: int = 4) -> list[Answer]:
        from vllm import SamplingParams

        prompts = [{"prompt": q.text, "multi_modal_data": {"image": list(q.images)}} for q in questions]
        how = SamplingParams(temperature=0, max_tokens=num_tokens, logprobs=-1, ignore_eos=True)
        outputs = self.llm.generate(prompts, how, use_tqdm=False)
        return [as_answer(output.outputs[0]) for output in outputs]


@dataclass
class Answer:
    """Tokens, and the log-probabilities of every token at every step, ``[steps, vocabulary]``."""

    tokens: list[int]
    logprobs: Tensor


def as_answer(output: Any) -> Answer:
    steps = [torch.tensor([step[i].logprob for i in range(len(step))], dtype=torch.float64) for step in output.logprobs]
    return Answer(list(output.token_ids), torch.stack(steps))


def expected(loaded: Any, strategy: dop.Strategy, question: Question, num_tokens: int = 4, **how: Any) -> Answer:
    """What Hugging Face's model says, pruned by ``dop.pruned``, asked alone."""
    inputs = loaded.processor(images=list(question.images), text=question.text, return_tensors="pt")
    with dop.pruned(loaded.model, strategy, **how), torch.inference_mode():
        output = loaded.model.generate(
            **inputs,
            max_new_tokens=num_tokens,
            eos_token_id=NO_TOKEN,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    scores = torch.stack([step[0] for step in output.scores]).double()
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(tokens, scores.log_softmax(dim=-1))


def divergence(true: Answer, found: Answer) -> float:
    """The largest KL of a step, in nats; infinite where other tokens were said."""
    if true.tokens != found.tokens:
        return float("inf")
    return float((true.logprobs.exp() * (true.logprobs - found.logprobs)).sum(dim=-1).max())

"""The divergence engine: what it says of a strategy is what the masked reference says of it."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from dop_search.divergence import DivergenceEngine
from dop_search.divergence.encoding import encode
from dop_search.divergence.teacher import Teacher, TeacherSample
from dop_search.models import adapter_for
from dop_search.models.prompts import with_answer
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.testing.conformance.base import PROMPTS, ConformanceBase, Models
from dop_search.testing.conformance.decoding import random_text
from dop_search.testing.inputs import Inputs
from dop_search.testing.reference import masked_forward
from dop_search.testing.strategies import CORNERS

NUM_ANSWER_TOKENS = 4
SELECTOR = "random"


class ScoringConformance(ConformanceBase):
    """KL of strategies on prompts of every kind, by the engine and by whole forwards of the reference."""

    def test_engine_equals_the_reference(self, models: Models) -> None:
        """Early starts, shared prefixes, cached states and packed chunks change no number.

        The reference scores each strategy on every other prompt, and each prompt under every other strategy.
        """
        model = models("sdpa")
        samples = [
            self.make_sample(model, *lengths, seed=seed, num_images=num_images)
            for seed, (lengths, _, num_images) in enumerate(PROMPTS.values())
        ]
        answers = [random_text(model, 1, NUM_ANSWER_TOKENS + seed) for seed in range(len(samples))]
        adapter, selector = adapter_for(model), make_selector(SELECTOR)
        known = []
        for number, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
            encoded = encode(adapter, sample, answer[0].tolist(), selector)
            with torch.no_grad():
                log_probs = log_probs_of(model(**with_answer(sample, answer[:, :-1])).logits, sample)
            known.append(TeacherSample(str(number), encoded, tuple(answer[0].tolist()), log_probs))
        strategies = [self.corner(name, model, *samples, selector=SELECTOR) for name in CORNERS]
        rows = list(zip(samples, answers, known, strict=True))
        pairs = [(i, j) for i in range(len(strategies)) for j in range(i % 2, len(rows), 2)]
        expected = np.array([self.divergence(model, *rows[j], strategies[i]) for i, j in pairs])
        assert expected.min() >= 0.0
        assert min(max(expected[n] for n, (i, _) in enumerate(pairs) if i == k) for k in range(len(strategies))) > 1e-3
        engine = DivergenceEngine(adapter, Teacher(tuple(known), "conformance", selector), batch_size=4)
        found = engine.evaluate(strategies)
        np.testing.assert_allclose([found[pair] for pair in pairs], expected, rtol=2e-3, atol=2e-5)

    def divergence(
        self, model: PreTrainedModel, sample: Inputs, answer: torch.Tensor, known: TeacherSample, strategy: Strategy
    ) -> float:
        """KL(full ‖ strategy) in nats, averaged over the answer."""
        inputs, length = with_answer(sample, answer[:, :-1]), sample["input_ids"].shape[1]
        logits = masked_forward(model, inputs, strategy, [known.encoded.ranking], length)
        full, ours = known.log_probs.double(), log_probs_of(logits, sample).double()
        return float((full.exp() * (full - ours)).sum(dim=-1).mean())


def log_probs_of(logits: torch.Tensor, sample: Inputs) -> torch.Tensor:
    """Of a batch of one: log-probabilities where the answer is predicted, ``[num_answer_tokens, vocabulary]``."""
    return logits[0, sample["input_ids"].shape[1] - 1 :].float().log_softmax(dim=-1)

"""More than one forward pass: generation and continuation on the shorter caches."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import dop_search as dop
from dop_search.models import adapter_for
from dop_search.testing.conformance.base import (
    PROMPTS,
    ConformanceBase,
    Models,
    backends,
    for_all,
    forward,
    generate,
    max_difference,
)
from dop_search.testing.inputs import Inputs, collate
from dop_search.testing.inputs import random_text as text_tokens
from dop_search.testing.reference import append_tokens, masked_forward, masked_generate, visual_token_ids
from dop_search.testing.strategies import dop_strategies
from dop_search.utils.errors import DopError

NUM_NEW_TOKENS = 7
NUM_LONG_TOKENS = 128
NUM_BEAMS = 3


class DecodingConformance(ConformanceBase):
    """Greedy and sampled generation, beams, continuation by several tokens, conversations."""

    @backends
    @for_all(data=st.data(), padded=st.booleans(), sample=st.booleans())
    def test_generate_equals_reference(
        self, models: Models, backend: str, data: st.DataObject, padded: bool, sample: bool
    ) -> None:
        """The logits after every token, and the tokens themselves where nothing is drawn at random."""
        model = models(backend)
        inputs, strategy, rankings = self.case(model, data, padded)
        with torch.random.fork_rng(devices=[]), dop.pruned(model, strategy, rankings=rankings):
            torch.manual_seed(0)
            output = generate(model, **inputs, **generate_arguments(model), do_sample=sample)
        tokens = output.sequences[:, -NUM_NEW_TOKENS:]
        expected = masked_forward(model, append_tokens(inputs, tokens), strategy, rankings)
        assert max_difference(torch.stack(output.logits, dim=1), before_each_new(expected)) <= self.tolerance
        if not sample:
            assert tokens.tolist() == masked_generate(model, inputs, strategy, rankings, NUM_NEW_TOKENS)

    @backends
    @for_all(data=st.data(), kind=st.sampled_from(list(PROMPTS)), chunk=st.sampled_from([None, 1, 3, 8]))
    def test_prompts_in_chunks_equal_reference(
        self, models: Models, backend: str, data: st.DataObject, kind: str, chunk: int | None
    ) -> None:
        """Every kind of prompt, fed at once or in chunks that cut through its images.

        The first token alone where transformers itself answers otherwise step by step than at once: in ``generate()``
        multimodal positions after a prompt that ends in an image are not those of a forward.
        """
        model, chunk = models(backend), chunk if self.prefills_in_chunks else None
        inputs = self.prompts(model, kind)
        strategy = data.draw(dop_strategies(self.num_layers(model), max_visual_tokens=40))
        rankings = self.rankings(model, inputs)
        arguments, length = {**inputs, **generate_arguments(model)}, inputs["input_ids"].shape[1]
        plain = generate(model, **arguments, do_sample=False)
        at_once = forward(model, append_tokens(inputs, plain.sequences[:, -NUM_NEW_TOKENS:]))
        same = max_difference(torch.stack(plain.logits, dim=1), before_each_new(at_once)) <= self.tolerance
        with dop.pruned(model, strategy, rankings=rankings):
            output = generate(model, **arguments, do_sample=False, prefill_chunk_size=chunk)
        tokens, count = output.sequences[:, -NUM_NEW_TOKENS:], NUM_NEW_TOKENS if same else 1
        expected = before_each_new(masked_forward(model, append_tokens(inputs, tokens), strategy, rankings, length))
        logits = torch.stack(output.logits, dim=1)
        assert max_difference(logits[:, :count], expected[:, :count]) <= self.tolerance
        expected_tokens = masked_generate(model, inputs, strategy, rankings, count)
        assert tokens[:, :count].tolist() == expected_tokens

    def test_long_answer_equals_reference(self, models: Models) -> None:
        """Hundreds of steps on the shorter caches, a padded batch: positions and masks do not drift."""
        model = models("sdpa")
        inputs = collate(self.samples(model))
        strategy = self.corner("layer_sets", model, inputs)
        rankings = self.rankings(model, inputs)
        arguments = {**generate_arguments(model), "max_new_tokens": NUM_LONG_TOKENS, "min_new_tokens": NUM_LONG_TOKENS}
        with dop.pruned(model, strategy, rankings=rankings):
            output = generate(model, **inputs, **arguments, do_sample=False)
        tokens = output.sequences[:, -NUM_LONG_TOKENS:]
        expected = masked_forward(model, append_tokens(inputs, tokens), strategy, rankings)
        logits = torch.stack(output.logits, dim=1)
        assert max_difference(logits, expected[:, -NUM_LONG_TOKENS - 1 : -1]) <= self.tolerance

    @backends
    @for_all(data=st.data(), padded=st.booleans())
    def test_beam_scores_equal_reference(self, models: Models, backend: str, data: st.DataObject, padded: bool) -> None:
        """Beams reorder the cache: the score of every returned beam is its log-likelihood under the reference."""
        model = models(backend)
        inputs, strategy, rankings = self.case(model, data, padded)
        with dop.pruned(model, strategy, rankings=rankings):
            output = generate(
                model,
                **inputs,
                **generate_arguments(model),
                do_sample=False,
                num_beams=NUM_BEAMS,
                num_return_sequences=NUM_BEAMS,
                length_penalty=0.0,
                output_scores=True,
            )
        tokens = output.sequences[:, -NUM_NEW_TOKENS:]
        scores = output.sequences_scores
        for beam in range(NUM_BEAMS):  # beams of a sample stand next to each other
            answers = tokens[beam::NUM_BEAMS]
            logits = before_each_new(masked_forward(model, append_tokens(inputs, answers), strategy, rankings))
            likelihood = logits.log_softmax(dim=-1).gather(-1, answers[..., None]).sum(dim=(1, 2))
            assert max_difference(scores[beam::NUM_BEAMS], likelihood) <= self.tolerance

    @backends
    @for_all(data=st.data(), padded=st.booleans())
    def test_continuation_equals_reference(
        self, models: Models, backend: str, data: st.DataObject, padded: bool
    ) -> None:
        """Several tokens at once on a pruned cache, then one, then several again."""
        model = models(backend)
        inputs, strategy, rankings = self.case(model, data, padded)
        steps = []
        with torch.no_grad(), dop.pruned(model, strategy, rankings=rankings):
            cache = model(**inputs, use_cache=True).past_key_values
            for length in (3, 1, 2):
                tokens = random_text(model, len(inputs["input_ids"]), length)
                inputs = append_tokens(inputs, tokens)
                # Without padding the model finds the positions itself, from the length of the cache.
                extra = continuation_arguments(model, inputs, length) if padded else {}
                steps.append(model(input_ids=tokens, past_key_values=cache, use_cache=True, **extra).logits)
        logits = torch.cat(steps, dim=1)
        expected = masked_forward(model, inputs, strategy, rankings)[:, -logits.shape[1] :]
        assert max_difference(logits, expected) <= self.tolerance

    @backends
    @for_all(data=st.data(), reopen=st.booleans())
    def test_conversation_is_right_or_refused(
        self, models: Models, backend: str, data: st.DataObject, reopen: bool
    ) -> None:
        """``generate()`` on the cache of an earlier answer, in the same context or in a new one: never silently wrong.

        transformers tells the new tokens from the cached ones by the length of the first layer's cache, which
        pruning shortens.
        """
        model = models(backend)
        inputs, strategy, rankings = self.case(model, data, padded=False)
        context = dop.pruned(model, strategy, rankings=rankings)
        try:
            with context:
                first = generate(model, **inputs, **generate_arguments(model), do_sample=False)
                asked = append_tokens(inputs, first.sequences[:, -NUM_NEW_TOKENS:])
                asked = append_tokens(asked, random_text(model, 1, 3))
                arguments = {**tokens_of(asked), **generate_arguments(model), "past_key_values": first.past_key_values}
                second = None if reopen else generate(model, **arguments, do_sample=False)
            if second is None:
                with dop.pruned(model, strategy, rankings=rankings):
                    second = generate(model, **arguments, do_sample=False)
        except DopError:
            return  # refused with a message
        answer = second.sequences[:, -NUM_NEW_TOKENS:]
        expected = masked_forward(model, append_tokens(asked, answer), strategy, rankings)
        assert max_difference(torch.stack(second.logits, dim=1), before_each_new(expected)) <= self.tolerance

    @backends
    @for_all(data=st.data())
    def test_calls_do_not_leak(self, models: Models, backend: str, data: st.DataObject) -> None:
        """Two conversations take turns in one context, with a call without a cache in between."""
        model = models(backend)
        strategy = data.draw(dop_strategies(self.num_layers(model)))
        prompts = [collate(self.samples(model, seed)) for seed in (1, 2)]
        rankings = self.rankings(model, prompts[0])
        results: list[tuple[Inputs, Tensor]] = []
        with torch.no_grad(), dop.pruned(model, strategy, rankings=rankings):
            caches = [model(**prompt, use_cache=True).past_key_values for prompt in prompts]
            results.append((prompts[1], model(**prompts[1], use_cache=False).logits[:, -1:]))
            for prompt, cache in zip(prompts, caches, strict=True):
                tokens = random_text(model, len(prompt["input_ids"]), 2)
                longer = append_tokens(prompt, tokens)
                extra = continuation_arguments(model, longer, 2)
                results.append((longer, model(input_ids=tokens, past_key_values=cache, **extra).logits))
        for inputs, logits in results:
            expected = masked_forward(model, inputs, strategy, rankings)[:, -logits.shape[1] :]
            assert max_difference(logits, expected) <= self.tolerance


def tokens_of(inputs: Inputs) -> dict[str, Any]:
    """The inputs without the images, which the cache holds already."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in inputs}


def generate_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Exactly ``NUM_NEW_TOKENS`` tokens, none of them a placeholder, with the unprocessed logits of each."""
    return {
        "max_new_tokens": NUM_NEW_TOKENS,
        "min_new_tokens": NUM_NEW_TOKENS,
        "suppress_tokens": [*visual_token_ids(model), *(model.generation_config.suppress_tokens or [])],
        "output_logits": True,
        "return_dict_in_generate": True,
    }


def before_each_new(logits: Tensor) -> Tensor:
    """Of a forward over prompt and answer: the logits from which each of the ``NUM_NEW_TOKENS`` was chosen."""
    return logits[:, -NUM_NEW_TOKENS - 1 : -1]


def random_text(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Random text tokens ``[batch, length]``."""
    return text_tokens(model, batch * length, length).view(batch, length)


def continuation_arguments(model: PreTrainedModel, inputs: Inputs, num_new: int) -> Inputs:
    """Mask and positions of the last ``num_new`` tokens, continuing those that the prefill chose by default."""
    attention_mask = inputs["attention_mask"]
    deltas = getattr(adapter_for(model).multimodal, "rope_deltas", None)
    if deltas is not None:  # M-RoPE: text positions, shifted per sample
        positions = (attention_mask.cumsum(dim=-1) - 1)[:, -num_new:]
        return {"attention_mask": attention_mask, "position_ids": (positions[None] + deltas).expand(3, -1, -1)}
    length = attention_mask.shape[1]
    positions = torch.arange(length - num_new, length).expand(len(attention_mask), -1)
    return {"attention_mask": attention_mask, "position_ids": positions}

"""One forward pass: the pruned model computes what the masked reference computes."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dop_search.strategy import Strategy
from dop_search.testing.conformance.base import (
    ConformanceBase,
    Models,
    backends,
    for_all,
    forward,
    max_difference,
    max_text_difference,
    prompt_kinds,
)
from dop_search.testing.inputs import collate, pack_rows
from dop_search.testing.reference import masked_forward, text_positions, visual_positions
from dop_search.testing.strategies import CORNERS, corner_strategy, dop_strategies

PACKED = ((3, 4), (0, 2), (2, 0))
"""Text before and after the image of each sequence of a packed row."""


class PrefillConformance(ConformanceBase):
    """Prefill with ``sdpa`` and ``eager`` attention, left-padded batches, any strategy."""

    @backends
    @for_all(data=st.data())
    def test_canonical_form_is_lossless(self, models: Models, backend: str, data: st.DataObject) -> None:
        """Dropping dead operations changes no text logit: exact, not an approximation."""
        model = models(backend)
        inputs, strategy, rankings = self.case(model, data)
        as_given = masked_forward(model, inputs, strategy, rankings)
        canonical = masked_forward(model, inputs, strategy.canonical(), rankings)
        text = text_positions(model, inputs)
        assert torch.equal(as_given[text], canonical[text])

    @backends
    def test_empty_strategy_is_bit_identical(self, models: Models, backend: str) -> None:
        """Nothing to skip, nothing to change."""
        model = models(backend)
        inputs = collate(self.samples(model))
        empty = Strategy.full(self.num_layers(model), selector="explicit")
        assert torch.equal(forward(model, inputs, empty, self.rankings(model, inputs)), forward(model, inputs))

    @backends
    @pytest.mark.parametrize("corner", CORNERS)
    def test_corners_equal_reference(self, models: Models, backend: str, corner: str) -> None:
        """Left-padded batch, the corners of the space.

        Each moves the logits far beyond the tolerance, so that a runtime that skips nothing fails.
        """
        model = models(backend)
        inputs = collate(self.samples(model))
        strategy = self.corner(corner, model, inputs)
        expected = self.check_forward(model, inputs, strategy, self.rankings(model, inputs))
        assert max_text_difference(model, inputs, expected, forward(model, inputs)) > 500 * self.tolerance

    @backends
    @for_all(data=st.data(), seed=st.integers(0, 99))
    def test_prefill_equals_reference(self, models: Models, backend: str, data: st.DataObject, seed: int) -> None:
        """Left-padded batch of different text lengths, any strategy, any ranking."""
        model = models(backend)
        strategy, inputs = data.draw(dop_strategies(self.num_layers(model))), collate(self.samples(model, seed % 3))
        self.check_forward(model, inputs, strategy, self.rankings(model, inputs, seed))

    @backends
    @for_all(data=st.data(), shapes=st.sampled_from([(0, 1), (2, 0, 1), (1,)]))
    def test_different_image_sizes_equal_reference(
        self, models: Models, backend: str, data: st.DataObject, shapes: tuple[int, ...]
    ) -> None:
        """Samples of one batch may bring different numbers of visual tokens."""
        model = models(backend)
        strategy = data.draw(dop_strategies(self.num_layers(model)))
        inputs = collate(self.samples(model, image_shapes=shapes))
        self.check_forward(model, inputs, strategy, self.rankings(model, inputs))

    @backends
    @prompt_kinds
    def test_reference_with_nothing_pruned_is_the_model(self, models: Models, backend: str, kind: str) -> None:
        """At every position of every kind of prompt: a reference that hides too much or too little is no oracle.

        It would be none for a decoder whose attention is not causal, such as PaliGemma's over its prefix: there a
        causal pruned model and a causal reference agree, and both are wrong.
        """
        model = models(backend)
        inputs = self.prompts(model, kind)
        expected = forward(model, inputs)
        everything = Strategy.full(self.num_layers(model), selector="explicit")
        logits = masked_forward(model, inputs, everything, self.rankings(model, inputs))
        real = inputs["attention_mask"].bool()
        difference = max_difference(logits[real], expected[real])
        assert difference <= self.tolerance, f"the reference is not this model: logits differ by {difference:.2g}"

    @backends
    @prompt_kinds
    @for_all(data=st.data(), seed=st.integers(0, 99))
    def test_every_kind_of_prompt_equals_reference(
        self, models: Models, backend: str, kind: str, data: st.DataObject, seed: int
    ) -> None:
        """Images at the start, where a query may find no key at all, at the end, and several of them."""
        model = models(backend)
        strategy = data.draw(dop_strategies(self.num_layers(model), max_visual_tokens=40))
        inputs = self.prompts(model, kind)
        self.check_forward(model, inputs, strategy, self.rankings(model, inputs, seed))

    @for_all(data=st.data())
    def test_packed_rows_equal_singles(self, models: Models, data: st.DataObject) -> None:
        """Padding-free rows, separated by positions that restart: each sequence as if it were alone."""
        model = models("sdpa")
        samples = [self.make_sample(model, *lengths, seed=seed) for seed, lengths in enumerate(PACKED)]
        packed = pack_rows(model, samples)
        starts = np.cumsum([0, *(sample["input_ids"].shape[1] for sample in samples)])
        strategy = data.draw(dop_strategies(self.num_layers(model)))
        rankings = self.rankings(model, collate(samples))
        plain = Strategy.full(self.num_layers(model), selector="explicit")
        for chosen in (plain, strategy) if self.separates_packed_rows else (strategy,):
            together = forward(model, packed, chosen, rankings, use_cache=False)
            for index, sample in enumerate(samples):
                alone = forward(model, sample, chosen, rankings[index : index + 1])
                part = together[:, starts[index] : starts[index + 1]]
                assert max_text_difference(model, sample, part, alone) <= self.tolerance

    @pytest.mark.skipif(
        importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available(),
        reason="flash-attn is not installed, or there is no GPU for it",
    )
    def test_flash_attention_equals_reference(self) -> None:
        """In half precision, against the masked reference on SDPA in the same precision."""
        model = self.make_model("sdpa").to("cuda", torch.bfloat16)  # type: ignore[arg-type]
        inputs = {name: _on_gpu(value) for name, value in collate(self.samples(model)).items()}
        rankings = self.rankings(model, inputs)
        strategies = [self.corner(corner, model, inputs) for corner in CORNERS]
        expected = [masked_forward(model, inputs, strategy, rankings) for strategy in strategies]
        model.set_attn_implementation("flash_attention_2")
        for strategy, reference in zip(strategies, expected, strict=True):
            logits = forward(model, inputs, strategy, rankings)
            assert max_text_difference(model, inputs, logits.float(), reference.float()) <= 0.05

    @backends
    def test_text_only_prompt_is_untouched(self, models: Models, backend: str) -> None:
        """Text tokens keep all their operations, so a prompt without an image has the full model's logits."""
        model = models(backend)
        input_ids = self.samples(model)[1]["input_ids"]
        text = input_ids[~visual_positions(model, input_ids)][None]
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        expected = forward(model, inputs)
        for corner in CORNERS:
            strategy = corner_strategy(corner, self.num_layers(model))
            logits = forward(model, inputs, strategy, self.rankings(model, inputs))
            assert max_difference(logits, expected) <= self.tolerance, corner

    @backends
    @for_all(data=st.data())
    def test_batch_equals_singles(self, models: Models, backend: str, data: st.DataObject) -> None:
        """Neither padding nor the other sample changes a sample."""
        model = models(backend)
        samples = self.samples(model)
        batch = collate(samples)
        strategy = data.draw(dop_strategies(self.num_layers(model)))
        rankings = self.rankings(model, batch)
        together = forward(model, batch, strategy, rankings)
        for index, sample in enumerate(samples):
            alone = forward(model, sample, strategy, rankings[index : index + 1])
            of_batch = together[index : index + 1, -alone.shape[1] :]
            assert max_text_difference(model, sample, of_batch, alone) <= self.tolerance


def _on_gpu(tensor: Tensor) -> Tensor:
    return tensor.to("cuda", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)

"""What every part of the suite shares: how models, samples and rankings are made, how logits are compared."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import dop_search as dop
from dop_search.models.text import MARKERS_KEY
from dop_search.strategy import Strategy
from dop_search.strategy.operations import TokenCounts
from dop_search.testing.inputs import Inputs, collate, context_sample, processed_sample
from dop_search.testing.reference import masked_forward, text_positions, visual_positions
from dop_search.testing.strategies import corner_strategy, dop_strategies, random_rankings

BACKENDS = ("sdpa", "eager")
TEXT_LENGTHS = ((3, 4), (5, 7))

PROMPTS = {
    "text_around": ((3, 4), (5, 7), 1),
    "image_first": ((0, 4), (0, 2), 1),
    "image_last": ((3, 0), (5, 0), 1),
    "one_image_last": ((3, 4), (5, 0), 1),
    "several_images": ((3, 4), (1, 2), 2),
    "several_images_one_last": ((2, 0), (1, 3), 2),
}
"""Text tokens before and after the images of each of two samples, and images per sample."""

prompt_kinds = pytest.mark.parametrize("kind", PROMPTS)
backends = pytest.mark.parametrize("backend", BACKENDS)
Models = Callable[[str], PreTrainedModel]


def for_all(**drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As ``hypothesis.given`` on a method of the suite, with the number of examples that its class asks for."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def test(self: ConformanceBase, **fixtures: Any) -> None:
            @settings(
                max_examples=self.max_examples,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow],
            )
            @given(**drawn)
            def run(**values: Any) -> None:
                check(self, **fixtures, **values)

            run()

        signature = inspect.signature(check)  # pytest provides what is not drawn
        fixtures = [item for name, item in signature.parameters.items() if name not in drawn]
        setattr(test, "__signature__", signature.replace(parameters=fixtures))  # noqa: B010
        return test

    return decorate


class ConformanceBase:
    """Override :meth:`make_model`, and :meth:`make_processor` or :meth:`make_sample`."""

    max_examples: ClassVar[int] = 15
    """Random strategies per property."""

    tolerance: ClassVar[float] = 2e-5
    """Allowed difference of logits, relative to the largest one (float32)."""

    prefills_in_chunks: ClassVar[bool] = True
    """Whether a prompt can come in chunks that do not all hold an image, or cut through one."""

    separates_packed_rows: ClassVar[bool] = True
    """Whether the model itself, with nothing pruned, keeps the sequences of packed rows apart."""

    def make_model(self, attn_implementation: str) -> PreTrainedModel:
        """A small random model in evaluation mode; the same weights at every call."""
        raise NotImplementedError

    def make_sample(
        self,
        model: PreTrainedModel,
        num_text_before: int,
        num_text_after: int,
        seed: int,
        image_shape: int = 0,
        num_images: int = 1,
    ) -> Inputs:
        """One prompt with a batch dimension of 1: text, images with text between them, text; either end may be none.

        By default the family's processor makes it; a model that reads text alone has contexts for images.
        """
        if (processor := self.processor()) is not None:
            return processed_sample(model, processor, num_text_before, num_text_after, seed, num_images, image_shape)
        if not hasattr(model.config, MARKERS_KEY):
            raise NotImplementedError("a family that reads images needs `make_processor`, or `make_sample`")
        return context_sample(model, num_text_before, num_text_after, seed, num_images, image_shape)

    def make_processor(self) -> Any:
        """The family's processor for the small model, with a chat template; ``None``: nothing is tested with one."""
        return None

    @classmethod
    @functools.cache
    def processor(cls) -> Any:
        """:meth:`make_processor`, once per class."""
        return cls().make_processor()

    @pytest.fixture(scope="class")
    @classmethod
    def models(cls) -> Models:
        """``models(backend)``: each model is built once per class."""
        return functools.cache(cls().make_model)

    def samples(self, model: PreTrainedModel, seed: int = 0, image_shapes: tuple[int, ...] = (0, 0)) -> list[Inputs]:
        """Prompts of different text lengths, one per image shape."""
        lengths = [TEXT_LENGTHS[index % len(TEXT_LENGTHS)] for index in range(len(image_shapes))]
        return [
            self.make_sample(model, before, after, seed=10 * seed + index, image_shape=shape)
            for index, ((before, after), shape) in enumerate(zip(lengths, image_shapes, strict=True))
        ]

    def prompts(self, model: PreTrainedModel, kind: str) -> Inputs:
        """A left-padded batch of one of the :data:`PROMPTS`."""
        first, second, num_images = PROMPTS[kind]
        return collate(
            [
                self.make_sample(model, *lengths, seed=seed, num_images=num_images)
                for seed, lengths in enumerate((first, second))
            ]
        )

    def rankings(self, model: PreTrainedModel, inputs: Inputs, seed: int = 0) -> list[np.ndarray]:
        """A random permutation of the visual tokens of each sample."""
        return random_rankings(visual_positions(model, inputs["input_ids"]).sum(dim=1).tolist(), seed)

    def case(
        self, model: PreTrainedModel, data: st.DataObject, padded: bool = True
    ) -> tuple[Inputs, Strategy, list[np.ndarray]]:
        """A prompt, or a left-padded batch of two, with any strategy and random rankings."""
        inputs = collate(self.samples(model)) if padded else self.samples(model)[1]
        return inputs, data.draw(dop_strategies(self.num_layers(model))), self.rankings(model, inputs)

    def check_forward(
        self, model: PreTrainedModel, inputs: Inputs, strategy: Strategy, rankings: list[np.ndarray], **more: Any
    ) -> Tensor:
        """A pruned forward equals the masked reference on text logits; returns the reference's logits."""
        expected = masked_forward(model, inputs, strategy, rankings, **more)
        logits = forward(model, inputs, strategy, rankings)
        assert max_text_difference(model, inputs, logits, expected) <= self.tolerance
        return expected

    def corner(self, name: str, model: PreTrainedModel, *prompts: Inputs, selector: str = "explicit") -> Strategy:
        """One of the corners of the space, with numbers of tokens that fit the smallest of the prompts."""
        counts = torch.cat([visual_positions(model, prompt["input_ids"]).sum(dim=1) for prompt in prompts])
        return corner_strategy(name, self.num_layers(model), selector, max(2, int(counts.min())))

    @staticmethod
    def num_layers(model: PreTrainedModel) -> int:
        """Decoder layers."""
        return int(model.config.get_text_config().num_hidden_layers)

    @staticmethod
    def token_counts(model: PreTrainedModel, sample: Inputs) -> TokenCounts:
        """Text and visual tokens of one unpadded sample; its last token counts as text."""
        return TokenCounts.of_prompt(visual_positions(model, sample["input_ids"])[0].numpy())


def forward(
    model: PreTrainedModel, inputs: Inputs, strategy: Strategy | None = None, rankings: Any = None, **more: Any
) -> Tensor:
    """Logits ``[batch, position, vocabulary]`` of the model, pruned where there is a strategy."""
    with torch.no_grad(), nullcontext() if strategy is None else dop.pruned(model, strategy, rankings=rankings):
        logits: Tensor = model(**inputs, **more).logits
    return logits


def generate(model: PreTrainedModel, **arguments: Any) -> Any:
    """``model.generate``, which the families have and ``PreTrainedModel`` does not declare."""
    generating: Any = model
    return generating.generate(**arguments)


def max_difference(logits: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected logit."""
    assert logits.shape == expected.shape
    return float((logits - expected).abs().max() / expected.abs().max())


def max_text_difference(model: PreTrainedModel, inputs: Inputs, logits: Tensor, expected: Tensor) -> float:
    """:func:`max_difference` where logits ``[batch, position, vocabulary]`` of a pruned model are defined."""
    text = text_positions(model, inputs)
    return max_difference(logits[text], expected[text])

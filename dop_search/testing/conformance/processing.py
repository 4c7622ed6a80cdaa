"""The family's own processor: prompts with images of several sizes, several images and videos, from disk to answers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dop_search as dop
from dop_search.data.samples import Sample, ValidationSet
from dop_search.divergence import DivergenceEngine, make_teacher
from dop_search.models import adapter_for
from dop_search.models.prompts import chat_prompt
from dop_search.models.tower import num_tokens
from dop_search.pruning.ranking import RankingSource, visual_counts
from dop_search.selectors import make_selector
from dop_search.testing.conformance.base import ConformanceBase, Models, forward, generate
from dop_search.testing.inputs import Inputs
from dop_search.testing.measure import model_state, state_difference
from dop_search.testing.naive import naive_divergence
from dop_search.testing.processors import drawn_image, drawn_video
from dop_search.testing.reference import masked_forward, visual_positions
from dop_search.utils.errors import UnsupportedModelError

SIZES = ((56, 40), (30, 70), (50, 50), (29, 28))
QUESTIONS = ("What is this?", "How many?", "Is there a red shape, or not?")
media_kinds = pytest.mark.parametrize("media", ["sizes", "several", "video", "mixed"])


def drawn_prompts(processor: Any, media: str) -> Inputs:
    """A left-padded batch: images of three ``sizes``, ``several`` images in one prompt, a ``video``, or both."""
    per_prompt = {"sizes": (1, 1, 1), "several": (2, 1), "alone": (2,), "video": (), "mixed": (1,)}[media]
    videos, number = int(media in ("video", "mixed")), iter(range(99))
    images = [[drawn_image(*SIZES[n % 4], n) for n in (next(number) for _ in range(k))] for k in per_prompt]
    texts = [
        chat_prompt(processor, QUESTIONS[row], per_prompt[row] if images else 0, videos)
        for row in range(len(images) or videos)
    ]
    given: dict[str, Any] = {"images": images} if images else {}
    if videos:
        given["videos"] = [drawn_video(4, 30, 40)]
    batch = processor(text=texts, padding=True, return_tensors="pt", **given)
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def drawn_samples(count: int) -> ValidationSet:
    """Questions about drawn images of different sizes."""
    samples = tuple(
        Sample(f"drawn/{n}", drawn_image(*SIZES[n], n), QUESTIONS[n % 3], ("yes",), "drawn") for n in range(count)
    )
    return ValidationSet("drawn", "search", 0, samples)


def rankings_of(
    model: PreTrainedModel, inputs: Inputs, selector: str, run: Callable[[], object]
) -> tuple[list[np.ndarray], Tensor]:
    """What a selector ranks while ``run`` runs the plain model; and its visual tokens ``[batch, length]``."""
    adapter = adapter_for(model)
    source = RankingSource(adapter, make_selector(selector))
    try:
        with torch.no_grad():
            run()
    finally:
        source.close()
    visual = adapter.visual_token_mask(inputs["input_ids"])
    return source.rank(visual_counts(visual)), visual


class ProcessingConformance(ConformanceBase):
    """Everything that starts from images; skipped where :meth:`make_processor` gives none."""

    selector: ClassVar[str] = "received_attention"
    """Ranks by what is in the images; another one for towers that show no attention."""

    takes_videos: ClassVar[bool] = False
    """Whether the processor takes ``videos=`` and the model has tokens of their own for them."""

    mixes_videos: ClassVar[bool] = True
    """Whether one call takes images and videos; where their tokens are the same, transformers takes one of them."""

    num_beams: ClassVar[int] = 2
    """1 where transformers itself gives beams other images than their prompt's, or knows no videos in them."""

    def drawn(self, media: str) -> Inputs:
        """A batch of one of the kinds; the test is skipped where the family has none."""
        if self.processor() is None:
            pytest.skip("the family has no processor")
        if media in ("video", "mixed") and not self.takes_videos:
            pytest.skip("the family takes no videos")
        if media == "mixed" and not self.mixes_videos:
            pytest.skip("the family takes images or videos")
        return drawn_prompts(self.processor(), media)

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dop.LoadedModel]:
        """``loaded()``: the model and the processor saved to a folder and loaded from it, once per class."""

        @cache
        def load() -> dop.LoadedModel:
            if cls.processor() is None:
                pytest.skip("the family has no processor")
            folder = tmp_path_factory.mktemp("family")
            cls().make_model("sdpa").save_pretrained(folder)
            cls().make_processor().save_pretrained(folder)
            return dop.load(str(folder), device="cpu", dtype="float32")

        return load

    @media_kinds
    def test_real_inputs_equal_the_masked_reference(self, models: Models, media: str) -> None:
        """Whatever the processor makes of images and videos: two strategies with random rankings."""
        model, inputs = models("sdpa"), self.drawn(media)
        assert visual_positions(model, inputs["input_ids"]).any(dim=1).all()
        for seed, corner in enumerate(("layer_sets", "half_of_the_tokens")):
            self.check_forward(model, inputs, self.corner(corner, model, inputs), self.rankings(model, inputs, seed))

    def test_counts_per_image_equal_the_masked_reference(self, models: Models) -> None:
        """Two images of other sizes in a prompt, and one: each is ranked and cut by itself."""
        model, inputs = models("sdpa"), self.drawn("several")
        adapter, rankings = adapter_for(model), self.rankings(model, inputs)
        half = self.corner("half_of_the_tokens", model, inputs)
        strategy = dataclasses.replace(half, num_visual_tokens=0.4, per_image=True)
        if not adapter.knows_images:
            with pytest.raises(UnsupportedModelError, match="per image"):
                dop.prune_(model, strategy)
            return
        watch = adapter.vision_watch.open()
        forward(model, inputs)
        watch.remove()
        grids = adapter.image_grids(visual_positions(model, inputs["input_ids"]).sum(dim=1).tolist())
        images = [[num_tokens(of_image) for of_image in sample] for sample in grids]
        assert [len(sizes) for sizes in images] == [2, 1]
        self.check_forward(model, inputs, strategy, rankings, images=images)

    @media_kinds
    @pytest.mark.parametrize("kind", ["of_places", "of_contents"])
    def test_rankings_are_permutations_and_the_same_in_generate(self, models: Models, media: str, kind: str) -> None:
        """``generate()`` encodes the images before the model's forward, and once for all beams."""
        model, inputs, selector = models("sdpa"), self.drawn(media), "uniform_grid"
        if kind == "of_contents":
            selector = self.selector
        rankings, visual = rankings_of(model, inputs, selector, lambda: model(**inputs))
        for ranking, row in zip(rankings, visual, strict=True):
            assert sorted(ranking) == list(range(int(row.sum())))
        arguments = {"max_new_tokens": 2, "do_sample": False, "num_beams": self.num_beams}
        again, _ = rankings_of(model, inputs, selector, lambda: generate(model, **inputs, **arguments))
        for ranking, other in zip(rankings, again, strict=True):
            np.testing.assert_array_equal(ranking, other)

    def test_a_ranking_does_not_depend_on_the_batch(self, models: Models) -> None:
        """The images of one prompt rank its tokens as they do when it is alone."""
        model, batch, alone = models("sdpa"), self.drawn("several"), self.drawn("alone")
        together, _ = rankings_of(model, batch, self.selector, lambda: model(**batch))
        single, _ = rankings_of(model, alone, self.selector, lambda: model(**alone))
        np.testing.assert_array_equal(together[0], single[0])

    def test_pruned_generation_with_a_selector_of_its_own(self, models: Models) -> None:
        """The whole way: tower, ranking, packed prefill, cached decoding, beams; the same twice, and not the model."""
        model, inputs = models("sdpa"), self.drawn("several")
        strategy = self.corner("layer_sets", model, inputs, selector=self.selector)
        arguments = {"max_new_tokens": 3, "do_sample": False, "num_beams": self.num_beams, "output_scores": True}

        def first_scores() -> Tensor:
            scores: Tensor = generate(model, **inputs, **arguments, return_dict_in_generate=True).scores[0]
            return scores

        full, before = first_scores(), model_state(model)
        with dop.pruned(model, strategy):
            scores = first_scores()
            assert torch.equal(scores, first_scores())
        assert state_difference(before, model_state(model)) == []
        assert not torch.allclose(scores, full)
        rankings, _ = rankings_of(model, inputs, self.selector, lambda: model(**inputs))
        expected = masked_forward(model, inputs, strategy, rankings)[:, -1].log_softmax(-1)
        scores = scores[:: self.num_beams].log_softmax(-1)
        finite = torch.isfinite(scores)
        expected = expected.masked_fill(~finite, -torch.inf).log_softmax(-1)
        torch.testing.assert_close(scores[finite], expected[finite], atol=1e-4, rtol=1e-4)

    def test_received_attention_is_what_the_eager_tower_computes(
        self, models: Models, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Against the full attention maps that transformers' own eager function returns."""
        if self.selector != "received_attention":
            pytest.skip("the tower shows no attention")
        inputs, model = self.drawn("sizes"), models("eager")
        adapter = adapter_for(model)
        attention = adapter.received_attention_module()
        module: Any = sys.modules[type(attention).__module__]
        original, maps = module.eager_attention_forward, []

        def recording(called: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(called, *args, **kwargs)
            if called is attention:
                maps.append(output[1])
            return output

        monkeypatch.setattr(module, "eager_attention_forward", recording)
        received: list[Tensor] = []
        handle = adapter.capture("received_attention", received.append)
        try:
            with torch.no_grad():
                model(**inputs)
            means = [mean_received(part.mean(dim=1), adapter.has_cls) for part in maps]
            expected = adapter.to_token_order(torch.cat(means, dim=1)[..., None])[:, 0]
        finally:
            handle.remove()
        assert len(received) == 1
        torch.testing.assert_close(received[0], expected, atol=1e-6, rtol=1e-5)
        assert received[0].std() > 1e-4

    def test_from_a_folder_to_pruned_generation(self, loaded: Callable[[], dop.LoadedModel]) -> None:
        """Saved and loaded, profiled, solved for a budget, and generated with the strategy."""
        for package in ("scipy", "pyarrow"):  # a search needs dop-search[search]
            pytest.importorskip(package)
        from dop_search.search import CurveGrid

        model, data = loaded(), drawn_samples(2)
        grid = CurveGrid(max_all_depths=0, num_depths=2, num_token_levels=2)
        profile = dop.profile(model, data, self.selector, space="dop", grid=grid, max_new_tokens=2)
        strategy = profile.solve(budget=dop.Budget(flops_ratio=0.8))
        assert 0.0 < strategy.provenance["cost_ratio"] <= 0.8
        inputs = drawn_prompts(model.processor, "sizes")
        with dop.pruned(model.model, strategy):
            tokens = generate(model.model, **inputs, max_new_tokens=3)
        assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3

    def test_engine_equals_plain_pruned_forwards(self, loaded: Callable[[], dop.LoadedModel]) -> None:
        """From images, with early start and shared prefixes, with states kept and without."""
        model, data = loaded(), drawn_samples(3)
        teacher = make_teacher(model, data, make_selector("uniform_grid"), max_new_tokens=4)
        strategies = [
            dop.Strategy.depthwise(4, 2, 3, 1, selector="uniform_grid"),
            dop.Strategy.depthwise(4, 3, 4, 2, num_visual_tokens=6, selector="uniform_grid"),
            dop.Strategy.from_array(
                np.random.default_rng(0).random((2, 4, 3)) < 0.6, shares=(0.25, 0.75), selector="uniform_grid"
            ),
        ]
        naive = np.stack([naive_divergence(model, data.samples, teacher, strategy) for strategy in strategies])
        assert naive.max(axis=1).min() > 1e-3
        for keep_states in (True, False):
            scores = DivergenceEngine(model.adapter, teacher, keep_states=keep_states).evaluate(strategies)
            np.testing.assert_allclose(scores, naive, rtol=2e-3, atol=2e-5)


def mean_received(attention: Tensor, cls: bool) -> Tensor:
    """``[tiles, queries, keys]`` to the mean that each patch receives from the patches that may see it.

    A CLS token neither asks nor is ranked; where images share a map, each has a block of it.
    """
    first = int(cls)
    asked = attention[:, first:, first:]
    asked = asked * (asked > 0).any(dim=1)[:, :, None]  # padding that nobody sees does not ask
    return asked.sum(dim=1) / (asked > 0).sum(dim=1).clamp(min=1)

"""What is not computed and not stored: pruning skips, it does not hide."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

import dop_search as dop
from dop_search.evaluation.timing.counting import count_decoder_flops
from dop_search.evaluation.timing.timing import cache_bytes
from dop_search.models import adapter_for
from dop_search.strategy.cost.flops import full_flops, strategy_flops
from dop_search.strategy.cost.kv_cache import strategy_kv_bytes
from dop_search.strategy.operations import LayerKind
from dop_search.testing.conformance.base import ConformanceBase, Models, backends, for_all
from dop_search.testing.measure import cache_lengths
from dop_search.testing.strategies import dop_strategies

NUM_AFTER = st.sampled_from([4, 0])
NUM_IMAGES = st.sampled_from([1, 2])


class SkippingConformance(ConformanceBase):
    """Cache lengths and counted FLOPs of one sample."""

    @backends
    @for_all(data=st.data(), num_after=NUM_AFTER, num_images=NUM_IMAGES)
    def test_cache_holds_only_kept_keys(
        self, models: Models, backend: str, data: st.DataObject, num_after: int, num_images: int
    ) -> None:
        """Per layer that attends: text, and the visual tokens whose group has ``kv`` there; in bytes as priced."""
        model = models(backend)
        sample = self.make_sample(model, 3, num_after, seed=0, num_images=num_images)
        strategy = data.draw(dop_strategies(self.num_layers(model)))
        counts = self.token_counts(model, sample)
        with torch.no_grad(), dop.pruned(model, strategy, rankings=self.rankings(model, sample)):
            cache = model(**sample, use_cache=True).past_key_values
        sizes = strategy.group_sizes(counts.visual)
        expected = [
            0
            if kind == LayerKind.RECURRENT
            else counts.text + sum(size for size, its in zip(sizes, strategy.groups, strict=True) if layer in its.kv)
            for layer, kind in enumerate(adapter_for(model).dims.kinds)
        ]
        assert cache_lengths(cache) == expected
        priced = strategy_kv_bytes(adapter_for(model).dims, strategy, counts, model.dtype.itemsize)
        assert cache_bytes(cache) == priced

    @for_all(data=st.data(), num_after=NUM_AFTER, num_images=NUM_IMAGES)
    def test_counted_flops_equal_closed_form(
        self, models: Models, data: st.DataObject, num_after: int, num_images: int
    ) -> None:
        """To the last FLOP, over all decoder layers; a prompt's last token costs what text does."""
        model = models("eager")
        sample = self.make_sample(model, 5, num_after, seed=1, num_images=num_images)
        # The empty strategy leaves the model untouched, dead operations included: it has no canonical price.
        strategy = data.draw(dop_strategies(self.num_layers(model)).filter(lambda drawn: not drawn.is_empty))
        with dop.pruned(model, strategy, rankings=self.rankings(model, sample)):
            counted_flops = count_decoder_flops(model, sample)
        assert counted_flops == strategy_flops(adapter_for(model).dims, strategy, self.token_counts(model, sample))

    def test_counted_flops_of_the_full_model(self, models: Models) -> None:
        """The denominator of every FLOPs ratio, and the check that the counter sees every decoder layer."""
        model = models("eager")
        sample = self.samples(model)[1]
        assert count_decoder_flops(model, sample) == full_flops(
            adapter_for(model).dims, self.token_counts(model, sample)
        )

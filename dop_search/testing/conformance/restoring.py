"""Leaving the context: the model as it was. Entering it wrongly: an error, and the model as it was."""

from __future__ import annotations

import pytest
import torch

import dop_search as dop
from dop_search.strategy import Strategy
from dop_search.testing.conformance.base import ConformanceBase, Models, backends, generate
from dop_search.testing.inputs import collate
from dop_search.testing.measure import model_state, state_difference
from dop_search.utils.errors import DopError


class RestoringConformance(ConformanceBase):
    """Attributes, hooks and logits after the context; nesting and misfits."""

    @backends
    @pytest.mark.parametrize("leave", ["exit", "exception"])
    def test_model_is_restored(self, models: Models, backend: str, leave: str) -> None:
        """No attribute, hook or flag is left over, and the logits are the old ones to the last bit."""
        model = models(backend)
        inputs = collate(self.samples(model))
        strategy = self.corner("layer_sets", model, inputs)
        rankings = self.rankings(model, inputs)
        with torch.no_grad():
            expected = model(**inputs).logits
            before = model_state(model)
            if leave == "exit":
                with dop.pruned(model, strategy, rankings=rankings):
                    assert not torch.equal(model(**inputs).logits, expected)
                    generate(model, **inputs, max_new_tokens=2, do_sample=False)
            else:
                with pytest.raises(KeyError), dop.pruned(model, strategy, rankings=rankings):
                    model(**inputs)["no such output"]
            assert state_difference(before, model_state(model)) == []
            assert torch.equal(model(**inputs).logits, expected)

    def test_in_place_form_is_undone(self, models: Models) -> None:
        """``prune_`` patches until ``restore()``, which may be called twice."""
        model = models("sdpa")
        inputs = self.samples(model)[0]
        before = model_state(model)
        with torch.no_grad():
            expected = model(**inputs).logits
            strategy = self.corner("half_depth", model, inputs)
            handle = dop.prune_(model, strategy, rankings=self.rankings(model, inputs))
            assert not torch.equal(model(**inputs).logits, expected)
            handle.restore()
            handle.restore()
            assert torch.equal(model(**inputs).logits, expected)
        assert state_difference(before, model_state(model)) == []

    def test_nesting_raises(self, models: Models) -> None:
        """A model is pruned by one strategy at a time; the outer context survives the error."""
        model = models("sdpa")
        inputs = self.samples(model)[0]
        strategy = self.corner("half_depth", model, inputs)
        rankings = self.rankings(model, inputs)
        with torch.no_grad(), dop.pruned(model, strategy, rankings=rankings):
            expected = model(**inputs).logits
            with pytest.raises(DopError), dop.pruned(model, strategy, rankings=rankings):
                pass
            assert torch.equal(model(**inputs).logits, expected)

    def test_other_depth_raises(self, models: Models) -> None:
        """A strategy for another number of layers is refused before anything is patched."""
        model = models("sdpa")
        before = model_state(model)
        num_layers = self.num_layers(model) + 1
        strategy = Strategy.depthwise(num_layers, 1, 1, 1, selector="explicit")
        with pytest.raises(DopError, match=str(num_layers)), dop.pruned(model, strategy, rankings=[]):
            pass
        assert state_difference(before, model_state(model)) == []

    def test_wrong_rankings_raise(self, models: Models) -> None:
        """A ranking that is no permutation of the sample's visual tokens is an error, and leaves nothing behind."""
        model = models("sdpa")
        inputs = self.samples(model)[0]
        (ranking,) = self.rankings(model, inputs)
        before = model_state(model)
        strategy = self.corner("half_of_the_tokens", model, inputs)
        for wrong in (ranking[:-1], ranking.clip(1), ranking + 1):
            with pytest.raises(DopError), torch.no_grad(), dop.pruned(model, strategy, rankings=[wrong]):
                model(**inputs)
            assert state_difference(before, model_state(model)) == []

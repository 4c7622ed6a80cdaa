"""Rankings: permutations, the right way up, and independent of the rest of the batch."""

import numpy as np
import pytest
import torch

from dop_search.models.prompts import model_inputs
from dop_search.pruning.ranking import RankingSource
from dop_search.selectors import SelectorInputs, make_selector
from dop_search.selectors.controls import farthest_point_order
from dop_search.utils.errors import DopError


def test_cls_attention_keeps_what_the_tower_looks_at(pocket, few_samples):
    """Against the attention weights that the eager vision tower reports itself."""
    inputs = model_inputs(pocket.processor, few_samples.samples[:2], torch.device("cpu"))
    tower, layer = pocket.model.model.vision_tower, pocket.model.config.vision_feature_layer
    implementation = tower.config._attn_implementation
    source = RankingSource(pocket.adapter, make_selector("cls_attention"))
    try:
        tower.set_attn_implementation("eager")
        with torch.inference_mode():
            pocket.model(**inputs)
            attentions = tower(inputs["pixel_values"], output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(implementation)
        source.close()
    num_patches = attentions[0].shape[-1] - 1
    for ranking, weights in zip(source.rank([num_patches] * 2), attentions[layer], strict=True):
        expected = weights.mean(dim=0)[0, 1:].numpy()
        assert expected[ranking[0]] == pytest.approx(expected.max(), rel=1e-4)
        assert np.all(np.diff(expected[ranking]) <= 1e-6), "best first"


def test_random_is_fixed_by_its_seed():
    inputs = SelectorInputs(30, ((5, 6),))
    a, b, c = (make_selector("random", {"seed": seed}).rank(inputs) for seed in (1, 1, 2))
    assert (a == b).all()
    assert (a != c).any()


def test_uniform_grid_covers_the_image():
    """With k tokens of an n × n grid no patch is farther from a kept one than on twice the ideal spacing."""
    side = 12
    points = np.stack(np.divmod(farthest_point_order(side, side), side), axis=1)
    cells = np.stack(np.divmod(np.arange(side * side), side), axis=1)
    for kept in (4, 9, 16, 36):
        distance = np.linalg.norm(cells[:, None] - points[None, :kept], axis=-1).min(axis=1).max()
        assert distance <= 2 * side / np.sqrt(kept)


def test_uniform_grid_treats_several_images_alike():
    order = make_selector("uniform_grid").rank(SelectorInputs(32, ((4, 4), (4, 4))))
    for kept in (2, 8, 16):
        assert (order[:kept] < 16).sum() == kept // 2


def test_unknown_names_get_a_suggestion():
    with pytest.raises(DopError, match=r"cls_atention.*did you mean 'cls_attention'"):
        make_selector("cls_atention")
    with pytest.raises(DopError, match=r"'random' has no option \['sede'\].*seed"):
        make_selector("random", {"sede": 1})


def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(DopError, match="NaN"):
        make_selector("cls_attention").rank(SelectorInputs(2, ((1, 2),), cls_attention=torch.tensor([0.5, torch.nan])))

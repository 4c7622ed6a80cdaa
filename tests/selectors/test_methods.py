"""Every published method against an independent transcription of its formula, token by token."""

from dataclasses import replace

import numpy as np
import pytest
import slow_selection as slow
import torch
from invented_inputs import invented

from dop_search.selectors import SELECTORS, make_selector
from dop_search.selectors.base import cosine_matrix
from dop_search.selectors.controls import balanced_cells
from dop_search.selectors.divprune import max_min_order
from dop_search.selectors.holov import segment_budgets
from dop_search.selectors.resize import grid_cells, smaller_grid
from dop_search.selectors.sharing import shares
from dop_search.selectors.tome import merge_schedule
from dop_search.utils.errors import DopError, UnsupportedModelError

NEEDS_CLIP = ("cdpruner", "trim")


def made(name, clip_folder, **options):
    return make_selector(name, {**({"clip": str(clip_folder)} if name in NEEDS_CLIP else {}), **options})


def merged_features(selection):
    return dict(zip(selection.slots.tolist(), selection.features.double().numpy(), strict=True))


# -- what holds for all ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize(("images", "dtype"), [(1, torch.float32), (2, torch.bfloat16)], ids=["one", "two-bfloat16"])
def test_choices_are_permutations_and_merge_into_kept_slots_only(name, images, dtype, clip_folder):
    selector, inputs = made(name, clip_folder), invented(images=images, dtype=dtype)
    count = inputs.num_visual_tokens
    for kept in (0, 1, 2, 17, count - 1, count, None):
        selection = selector.select(inputs, kept)
        assert sorted(selection.order) == list(range(count))
        assert (selection.order == selector.rank(inputs, kept)).all()
        total = count if kept is None else kept
        if selection.features is not None:
            assert len(selection.slots) == len(set(selection.slots.tolist())) == len(selection.features)
            assert set(selection.slots.tolist()) <= set(selection.order[:total].tolist())
            assert torch.isfinite(selection.features).all()
        if total in (0, count):
            assert selection.features is None, "nothing is merged where nothing is dropped"


@pytest.mark.parametrize("name", sorted(name for name in SELECTORS if SELECTORS[name].nested))
def test_nested_means_that_one_ranking_serves_every_count(name, clip_folder):
    selector, inputs = made(name, clip_folder), invented()
    everything = selector.rank(inputs)
    for kept in (1, 5, 20, 47):
        assert (selector.rank(inputs, kept)[:kept] == everything[:kept]).all()


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_equal_inputs_give_equal_choices(name, clip_folder):
    first, second = (made(name, clip_folder).select(invented(), 17) for _ in range(2))
    assert (first.order == second.order).all()
    assert first.features is None or torch.equal(first.features, second.features)


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_ties_keep_the_order_of_the_tokens_and_choose_without_error(name, clip_folder):
    """A blank image: every token is the same."""
    inputs = invented()
    fields = ("cls_attention", "last_cls_attention", "keys", "last_keys", "features")
    same = {field: getattr(inputs, field)[:1] for field in (*fields, "embeds", "patch_states")}
    inputs = replace(inputs, **{field: value.repeat(48, *[1] * (value.ndim - 1)) for field, value in same.items()})
    order = made(name, clip_folder).rank(inputs, 9)
    assert sorted(order) == list(range(48))
    if name in ("cls_attention", "hired", "cdpruner_llm"):
        assert (order == np.arange(48)).all()


# -- one by one --------------------------------------------------------------------------------------


def test_visionzip_published_counts():
    split = make_selector("visionzip").split
    assert [split(count) for count in (192, 128, 64, 32)] == [(162, 30), (108, 20), (54, 10), (27, 5)]


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize(("kept", "seed"), [(16, 0), (20, 1), (32, 2)])
def test_visionzip(kept, seed, cls_token):
    inputs, selector = invented(seed=seed), make_selector("visionzip", {"cls_token": cls_token})
    selection = selector.select(inputs, kept)
    patches, merged = slow.visionzip(inputs, *selector.split(kept), cls_token)
    ours, slots = merged_features(selection), set(merged) - {-1}
    if cls_token:
        (place,) = set(ours) - slots
        np.testing.assert_allclose(ours[place], merged[-1], rtol=1e-5)
        assert place not in patches
    assert set(selection.order[:kept]) == set(patches) | set(ours)
    for target in slots:
        np.testing.assert_allclose(ours[target], merged[target], rtol=1e-4, atol=1e-5)
    assert [token for token in selection.order[:kept] if token not in ours] == patches, "best first"


def test_visionzip_takes_received_attention_where_there_is_no_cls_token():
    selector = make_selector("visionzip", {"attention": "received"})
    assert selector.needs() == {"received_attention", "keys", "embeds", "tiles"}
    inputs = replace(invented(), cls_attention=None, cls_feature=None, features=None)
    assert selector.rank(inputs, 16)[0] == int(inputs.received_attention.argmax())
    with pytest.raises(DopError, match=r"cls.*received.*'mean'"):
        make_selector("visionzip", {"attention": "mean"})


@pytest.mark.parametrize(("kept", "seed"), [(4, 0), (12, 1), (30, 2)])
def test_prumerge_plus(kept, seed):
    inputs = invented(seed=seed)
    attention = inputs.last_cls_attention.clone()
    attention[[5, 30, 31]] = torch.tensor([0.3, 0.2, 0.1])  # outliers
    inputs = replace(inputs, last_cls_attention=attention)
    selection = make_selector("prumerge_plus", {"num_neighbors": 7}).select(inputs, kept)
    patches, merged = slow.prumerge_plus(inputs, kept, 7)
    assert selection.order[: kept - 1].tolist() == patches
    assert selection.order[:3].tolist() == [5, 30, 31]
    ours = merged_features(selection)
    (place,) = set(ours) - set(patches)
    np.testing.assert_allclose(ours[place], merged[-1], rtol=1e-4, atol=1e-5)
    for token in patches:
        np.testing.assert_allclose(ours[token], merged[token], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_divprune(seed, lazy):
    inputs = invented(seed=seed)
    assert make_selector("divprune_lazy" if lazy else "divprune").rank(inputs, 20)[:20].tolist() == slow.divprune(
        inputs, 20, lazy
    )


@pytest.mark.parametrize("seed", range(4))
def test_lazy_divprune_is_the_published_greedy_from_another_start(seed):
    """The token that is on average farthest from all others, then the same set as from all pairs."""
    inputs = invented(8, 9, seed=seed)
    units = torch.nn.functional.normalize(inputs.embeds, dim=1).numpy()
    distance = 1 - units @ units.T
    start = int(distance.sum(axis=1).argmax())
    for kept in (1, 2, 15, 72):
        order = make_selector("divprune_lazy").rank(inputs, kept)[:kept].tolist()
        assert order == max_min_order(distance.__getitem__, start, kept).tolist()


@pytest.mark.parametrize(("kept", "alpha", "seed"), [(12, 1.0, 0), (30, 0.5, 1), (48, 2.0, 2)])
def test_scope(kept, alpha, seed):
    inputs = invented(seed=seed)
    assert make_selector("scope", {"alpha": alpha}).rank(inputs, kept)[:kept].tolist() == slow.scope(
        inputs, kept, alpha
    )


@pytest.mark.parametrize(("threshold", "steps", "seed"), [(0.5, 5, 0), (0.3, 1, 1), (0.7, 3, 2)])
def test_gprune(threshold, steps, seed):
    inputs = invented(seed=seed)
    order = make_selector("gprune", {"threshold": threshold, "num_steps": steps}).rank(inputs)
    assert order[:20].tolist() == slow.gprune(slow.array(inputs.embeds), 20, threshold, 0.03, steps)
    with pytest.raises(DopError, match="threshold"):
        make_selector("gprune", {"threshold": 0.0})


def test_divprune_prefers_what_is_different():
    """Two crowds of near duplicates and two loners: four tokens are one of each."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.eye(8)[[0] * 20 + [1] * 20 + [2, 3]]
    inputs = replace(invented(6, 7), embeds=directions + 1e-3 * torch.randn(directions.shape, generator=generator))
    kept = make_selector("divprune").rank(inputs, 4)[:4]
    assert {40, 41} < set(kept.tolist())
    assert sorted(token // 20 for token in kept) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("kept", "share", "step", "seed"), [(10, 0.5, 8, 0), (25, 0.75, 3, 1), (40, 0.0, 8, 2), (7, 1.0, 8, 3)]
)
def test_vispruner(kept, share, step, seed):
    inputs = invented(seed=seed)
    order = make_selector("vispruner", {"important_share": share, "step": step}).rank(inputs, kept)
    assert set(order[:kept].tolist()) == slow.vispruner(inputs, kept, share, step)
    important = int(share * kept)
    assert order[:important].tolist() == slow.best(slow.array(inputs.cls_attention), important)


@pytest.mark.parametrize(("theta", "seed"), [(None, 0), (None, 1), (0.6, 2)])
def test_cdpruner_llm(theta, seed):
    inputs = invented(seed=seed)
    embeds, text = slow.array(inputs.embeds), slow.array(inputs.text_embeds)
    similarity = np.array([np.mean([slow.cosine(e, t) for t in text]) for e in embeds])
    order = make_selector("cdpruner_llm", {"theta": theta}).rank(inputs, 16)
    assert order[:16].tolist() == slow.cdpruner(embeds, similarity, 16, theta)
    negated = make_selector("cdpruner_llm", {"theta": theta, "negate": True}).rank(inputs, 16)
    assert negated[:16].tolist() == slow.cdpruner(embeds, -similarity, 16, theta)


def test_cdpruner_llm_keeps_what_the_question_is_about():
    """Equally diverse tokens: the first one taken is the most relevant one, the least relevant one comes last."""
    inputs = replace(invented(2, 4), embeds=torch.eye(24)[:8], text_embeds=torch.linspace(1.0, 0.1, 24)[None])
    assert make_selector("cdpruner_llm").rank(inputs).tolist() == list(range(8))


def clip_similarity(inputs, clip_folder):
    """Patches, raw pieces of the text, and its beginning with an end token, by transformers' own features."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    ids = tokenizer(inputs.text, add_special_tokens=False)["input_ids"]
    longest = model.config.text_config.max_position_embeddings
    assert len(ids) + 2 > longest, "the text must be longer than one piece"
    raw = [0, *ids, 1]
    whole = [raw[start : start + longest] for start in range(0, len(raw), longest)]
    with torch.no_grad():
        patches, columns = model.visual_projection(inputs.patch_states), []
        for piece in [*whole, [*raw[: longest - 1], 1]]:
            features = model.get_text_features(input_ids=torch.tensor([piece]))
            columns.append(getattr(features, "pooler_output", features)[0])
    return patches, torch.stack(columns[:-1]), columns[-1]


def test_cdpruner_by_clip(clip_folder):
    inputs = invented(seed=4)
    patches, segments, _ = clip_similarity(inputs, clip_folder)
    similarity = np.array([np.mean([slow.cosine(slow.array(p), slow.array(t)) for t in segments]) for p in patches])
    order = make_selector("cdpruner", {"clip": str(clip_folder)}).rank(inputs, 16)
    assert order[:16].tolist() == slow.cdpruner(slow.array(inputs.embeds), -similarity, 16)


def test_trim_by_clip(clip_folder):
    """Ranks by the negated dot product, and the mean of what all others give the projector is one of the tokens."""
    inputs = invented(seed=5)
    patches, _, text = clip_similarity(inputs, clip_folder)
    similarity = np.array([slow.array(patch) @ slow.array(text) for patch in patches])
    selection = make_selector("trim", {"clip": str(clip_folder)}).select(inputs, 12)
    kept = slow.best(-similarity, 11)
    assert selection.order[:11].tolist() == kept
    dropped = [token for token in range(48) if token not in kept]
    assert selection.order[11] == selection.slots[0] == dropped[-1]
    assert selection.space == "features"
    np.testing.assert_allclose(
        selection.features[0].numpy(), slow.array(inputs.features)[dropped].mean(axis=0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", NEEDS_CLIP)
def test_clip_methods_refuse_without_a_text_encoder(name, pocket, clip_folder, tmp_path):
    with pytest.raises(UnsupportedModelError, match=rf"{name}.*no text encoder.*clip=.*selector={name}_llm"):
        make_selector(name).prepare(16)
    with pytest.raises(UnsupportedModelError, match=r"128 channels.*for 16"):
        make_selector(name, {"clip": str(clip_folder)}).prepare(128)
    with pytest.raises(UnsupportedModelError, match="cannot load CLIP"):
        make_selector(name, {"clip": str(tmp_path / "nothing")}).prepare(16)


def test_trim_llm_mean_token():
    inputs = invented(seed=6)
    embeds, text = slow.array(inputs.embeds), slow.array(inputs.text_embeds).mean(axis=0)
    by_relevance = slow.best(np.array([slow.cosine(e, text) for e in embeds]), 48)
    selection = make_selector("trim_llm").select(inputs, 10)
    assert selection.order[:9].tolist() == by_relevance[:9]
    np.testing.assert_allclose(
        selection.features[0].numpy(), embeds[by_relevance[9:]].mean(axis=0), rtol=1e-4, atol=1e-5
    )
    plain = make_selector("trim_llm", {"mean_token": False}).select(inputs, 10)
    assert plain.features is None
    assert plain.order[:10].tolist() == by_relevance[:10]


@pytest.mark.parametrize(("kept", "alpha", "seed"), [(16, 0.09, 0), (23, 5.0, 1), (29, 0.0, 2)])
def test_holov(kept, alpha, seed):
    inputs = invented(seed=seed)
    order = make_selector("holov", {"num_segments": 8, "alpha": alpha}).rank(inputs, kept)
    assert set(order[:kept].tolist()) == slow.holov(inputs, kept, 8, alpha)


def test_holov_hands_out_what_full_segments_cannot_take():
    """By the same rule: 12 tokens in proportion to 90 : 6 : 4, where the first segment has 5 places."""
    assert segment_budgets(np.array([90.0, 6.0, 4.0]), [5, 8, 8], 12).tolist() == [5, 5, 2]
    assert segment_budgets(np.array([1.0, 1.0, 1.0]), [2, 2, 2], 9).tolist() == [2, 2, 2]


@pytest.mark.parametrize(("kept", "alpha", "seed"), [(12, 0.5, 0), (30, 0.1, 1), (40, 1.0, 2)])
def test_hiprune(kept, alpha, seed):
    inputs = invented(seed=seed)
    order = make_selector("hiprune", {"alpha": alpha}).rank(inputs, kept)
    assert set(order[:kept].tolist()) == slow.hiprune(inputs, kept, alpha, 8)


@pytest.mark.parametrize(("kept", "window", "seed"), [(16, 3, 0), (30, 4, 1), (9, 6, 2)])
def test_vscan(kept, window, seed):
    inputs = invented(seed=seed)
    selection = make_selector("vscan", {"window": window}).select(inputs, kept)
    tokens, merged = slow.vscan(inputs, kept, window)
    assert selection.order[:kept].tolist() == tokens
    for token, feature in merged_features(selection).items():
        np.testing.assert_allclose(feature, merged[token], rtol=1e-4, atol=1e-5)


def test_hired_without_crops_is_cls_attention():
    inputs = invented()
    for kept in (5, 20):
        assert (make_selector("hired").rank(inputs, kept) == make_selector("cls_attention").rank(inputs)).all()


def test_hired_gives_crops_what_the_whole_image_sees_in_them():
    """A whole image of 4 × 4 tokens and 2 × 2 crops; the first layer looks at the lower right quarter alone."""
    crops = torch.tensor([0] * 16 + [1] * 16 + [2] * 16 + [3] * 16 + [4] * 16 + [-1] * 8)
    generator = torch.Generator().manual_seed(0)
    first, last = torch.rand(2, 88, generator=generator)
    first[[10, 11, 14, 15]] += 1.0
    last[-8:] += 5.0  # newline tokens never count
    inputs = replace(
        invented(8, 11), cls_attention=last, layers={"cls_attention@0": first}, tiles=crops, tile_grid=(2, 2)
    )
    kept = make_selector("hired", {"full_share": 0.75}).rank(inputs, 8)[:8]  # a quarter of 16 positions is counted
    assert sorted(crops[kept].tolist()) == [0] * 6 + [4] * 2
    whole = [token for token in kept if token < 16]
    assert whole == slow.best(slow.array(last[:16]), 6)
    # 20 tokens: half of the whole image's positions, the best eight, are counted per quarter
    kept = make_selector("hired").rank(inputs, 20)[:20]
    top = slow.best(slow.array(first[:16]), 8)
    quarter = [2 * (p // 4 // 2) + (p % 4) // 2 for p in top]
    expected = slow.apportion([quarter.count(c) for c in range(4)], [16] * 4, 10)
    assert [int((crops[kept] == c + 1).sum()) for c in range(4)] == expected


# -- grids, shares, schedules ----------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (16, 16), (5, 9), (1, 30)])
def test_balanced_cells_are_boxes_of_nearly_the_same_size(rows, columns):
    for count in range(1, rows * columns + 1, 7):
        cells, middles = balanced_cells(rows, columns, count)
        assert set(cells) == set(range(count)), "exactly that many, none empty"
        assert (cells[middles] == np.arange(count)).all(), "a middle lies in its box"
        grid = cells.reshape(rows, columns)
        for cell in range(count):
            r, c = np.nonzero(grid == cell)
            assert len(r) == (np.ptp(r) + 1) * (np.ptp(c) + 1), "a box"


def test_avg_pool_averages_each_box():
    inputs = invented()
    selection = make_selector("avg_pool").select(inputs, 13)
    cells, _ = balanced_cells(6, 8, 13)
    for slot, feature in merged_features(selection).items():
        members = np.flatnonzero(cells == cells[slot])
        np.testing.assert_allclose(feature, slow.array(inputs.embeds)[members].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_smaller_grid_is_the_largest_of_about_the_same_shape():
    assert [smaller_grid(16, 16, count) for count in (256, 64, 22, 4, 3, 1)] == [
        (16, 16), (8, 8), (5, 4), (2, 2), (2, 1), (1, 1)
    ]  # fmt: skip
    for count in range(1, 577):
        a, b = smaller_grid(24, 24, count)
        assert a * b <= count
        assert max(a, b) <= 2 * min(a, b)
        cells, middles = grid_cells(24, 24, (a, b))
        assert (cells[middles] == np.arange(a * b)).all()


def test_shares_add_up_and_respect_capacities():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights, capacities = rng.random(6), rng.integers(0, 9, 6)
        total = int(rng.integers(0, 40))
        result = shares(weights, capacities, total)
        assert result.sum() == min(total, capacities.sum())
        assert (result <= capacities).all()
        if total <= capacities.sum():
            assert result.tolist() == slow.apportion(weights, capacities, total)


def test_two_images_get_half_each():
    inputs = invented(images=2)
    for name in ("visionzip", "prumerge_plus", "vispruner", "avg_pool", "holov"):
        selection = make_selector(name).select(inputs, 20)
        assert (selection.order[:20] < 48).sum() == 10, name
    one = make_selector("prumerge_plus").select(inputs, 1)  # one image keeps nothing, and must not say of what kind
    assert one.space == make_selector("prumerge_plus").select(inputs, 20).space == "features"


def test_merge_schedule_takes_the_smallest_constant_number():
    assert merge_schedule(576, 64, 23) == (23,) * 22 + (6,)
    for kept in range(8, 257):
        schedule = merge_schedule(256, kept, 5)
        assert 256 - sum(schedule) == kept
        count = 256
        for merged in schedule:
            assert 0 <= merged <= count // 2
            count -= merged
    with pytest.raises(DopError, match=r"5 layers.*256 cannot become 7; at least 8"):
        merge_schedule(256, 7, 5)
    assert make_selector("tome").fewest_tokens(256, 5) == 8
    assert make_selector("tome").fewest_tokens(577, 3) == 73  # 289, 145, 73
    merge_schedule(577, 73, 3)


def test_cosines_in_half_precision_are_computed_in_single():
    values = torch.randn(6, 32).bfloat16()
    torch.testing.assert_close(cosine_matrix(values), cosine_matrix(values.float()))

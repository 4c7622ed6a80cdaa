"""Selectors before the decoder: the kept tokens and their features are those of the papers' released code."""

from __future__ import annotations

import types
from functools import partial

import numpy as np
import pytest
import torch
from golden_cases import Case, case_names, cases, read_case, tiny_clip, tiny_llava, tiny_qwen_tower

from dop_search.models import adapter_for
from dop_search.models.capture import TowerView
from dop_search.selectors import SelectorInputs, make_selector
from dop_search.selectors.base import descending, finite_array
from dop_search.selectors.cdpruner import greedy_map, normalised
from dop_search.selectors.clip_text import ClipText
from dop_search.selectors.flowcut import FlowCutPatch, PackedFlowCutPatch
from dop_search.selectors.hiprune import MIDDLE
from dop_search.selectors.holov import HoloVSelector
from dop_search.selectors.tome import merge_most_similar, merge_schedule

# -- ranking by what is given -----------------------------------------------------------------------------------------


def inputs_of(case: Case, **tensors: torch.Tensor) -> SelectorInputs:
    grid = tuple(case.settings["grid"])
    return SelectorInputs(grid[0] * grid[1], (grid,), **tensors)


def kept_of(name: str, inputs: SelectorInputs, case: Case, **options) -> list[int]:
    count = case.settings["num_kept"]
    return make_selector(name, options).rank(inputs, count)[:count].tolist()


@cases("fastervlm")
def test_fastervlm(case: Case) -> None:
    inputs = inputs_of(case, cls_attention=case["in.cls_attention"].mean(dim=0))
    assert kept_of("cls_attention", inputs, case) == case["out.order"].tolist()


@cases("divprune")
def test_divprune(case: Case) -> None:
    """The two tokens that start are each other's nearest neighbours, whose order rounding decides."""
    kept, expected = kept_of("divprune", inputs_of(case, embeds=case["in.embeds"]), case), case["out.order"].tolist()
    assert sorted(kept) == sorted(expected)
    assert kept[2:] == expected[2:] or kept == expected


@cases("scope")
def test_scope(case: Case) -> None:
    inputs = inputs_of(case, features=case["in.features"], cls_attention=case["in.cls_attention"].mean(dim=0))
    assert kept_of("scope", inputs, case, alpha=case.settings["alpha"]) == case["out.order"].tolist()


@cases("gprune")
def test_gprune(case: Case) -> None:
    """The base view and the unpadded crops are a graph each; newline tokens, which they keep, come last here."""
    base, rows, columns = (case.settings[name] for name in ("base", "rows", "columns"))
    newlines = torch.arange(base + columns, base + rows * (columns + 1), columns + 1)
    tiles = (torch.arange(base + rows * (columns + 1)) >= base).long()
    tiles[newlines] = -1
    grids = ((1, base), (rows, columns + 1))
    inputs = SelectorInputs(len(tiles), grids, embeds=case["in.embeds"], tiles=tiles, tile_grid=(1, 1))
    case.close("out.information", make_selector("gprune").information(case["in.embeds"][:base]))
    order = make_selector("gprune").rank(inputs)
    base_order, crops = order[order < base].tolist(), order[(order >= base) & (tiles[order] > 0).numpy()].tolist()
    assert base_order[: len(case["out.base"])] == case["out.base"].tolist()
    assert crops[: len(case["out.crops"])] == case["out.crops"].tolist()
    assert order[-rows:].tolist() == newlines.tolist()


@cases("hiprune")
def test_hiprune(case: Case) -> None:
    inputs = inputs_of(case, global_attention=case["in.deep_received"], layers={MIDDLE: case["in.shallow_received"]})
    kept = kept_of("hiprune", inputs, case, alpha=case.settings["alpha"])
    assert sorted(kept[: len(case["out.anchors_and_buffers"])]) == case.kept("out.anchors_and_buffers")
    assert sorted(kept) == case.kept()


@cases("vispruner")
def test_vispruner(case: Case) -> None:
    inputs = inputs_of(case, features=case["in.features"], cls_attention=case["in.cls_attention"].mean(dim=0))
    share, step = case.settings["important_ratio"], case.settings["step"]
    kept = kept_of("vispruner", inputs, case, important_share=share, step=step)
    important = case["out.important"].tolist()
    assert kept[: len(important)] == important
    assert sorted(kept) == case.kept()


@cases("holov")
def test_holov(case: Case) -> None:
    """Where a segment is full, the released code keeps zero tokens (-1); ours go to the other segments."""
    inputs = inputs_of(case, embeds=case["in.embeds"], cls_attention=case["in.attention"])
    segments, total = case.settings["num_segments"], case.settings["num_kept"]
    selector = HoloVSelector(num_segments=segments, alpha=case.settings["beta"])
    runs = np.array_split(np.arange(inputs.num_visual_tokens), segments)
    case.close("out.segment_scores", torch.from_numpy(selector.segment_scores(inputs, runs)))
    kept = selector.rank(inputs, total)[:total].tolist()
    expected = [token for token in case.kept("out.positions") if token >= 0]
    assert len(expected) == total - case.settings["zero_padded"]
    if len(expected) == total:
        assert sorted(kept) == expected
        assert [len(set(run) & set(kept)) for run in runs] == case["out.budgets"].tolist()
    else:
        assert set(expected) < set(kept)


@cases("hired")
def test_hired(case: Case) -> None:
    """Against the released function with the whole image listed crop by crop; it loses what rounding down leaves."""
    first, last = (case[f"in.{name}"].mean(dim=1) for name in ("first_cls_attention", "cls_attention"))
    tiles = torch.arange(len(last)).repeat_interleave(last.shape[1])
    grid = (case.settings["crop_rows"], case.settings["crop_cols"])
    inputs = SelectorInputs(
        last.numel(), ((1, last.numel()),), cls_attention=last.flatten(), layers={"cls_attention@0": first.flatten()},
        tiles=tiles, tile_grid=grid,
    )  # fmt: skip
    total = case.settings["total_budget"]
    kept = np.zeros(last.numel(), dtype=bool)
    kept[make_selector("hired", {"full_share": case.settings["alpha"]}).rank(inputs, total)[:total]] = True
    kept, expected = kept.reshape(last.shape), case["out.mask_blocks"].numpy()
    budgets, theirs = kept.sum(axis=1), case["out.budgets_blocks"].numpy()
    assert budgets.sum() == total
    assert budgets[0] == theirs[0] == case.settings["full_image_budget"]
    assert ((budgets - theirs >= 0) & (budgets - theirs <= 1)).all()
    assert (kept >= expected).all()
    assert (kept[budgets == theirs] == expected[budgets == theirs]).all()
    if case.settings["regions_as_released_are_the_crops"]:
        assert (expected == case["out.mask"].numpy()).all()


# -- merging ----------------------------------------------------------------------------------------------------------


@cases("visionzip")
def test_visionzip(case: Case) -> None:
    count = case.settings["num_kept"]
    inputs = inputs_of(
        case,
        cls_attention=case["in.cls_attention"].mean(dim=0),
        keys=case["in.keys"].mean(dim=1),
        features=case["in.features"],
        cls_feature=case["in.cls_feature"].expand_as(case["in.features"]),
    )
    contextual = case.settings["contextual"]
    selection = make_selector("visionzip", {"contextual_share": contextual / count}).select(inputs, count)
    slots = selection.slots.tolist()
    dominant = sorted(set(selection.order[:count].tolist()) - set(slots))
    assert dominant == case.kept("out.dominant")
    merged, cls = selection.features[:contextual], selection.features[contextual:]
    case.close("out.tokens", torch.cat([cls, case["in.features"][dominant], merged]))


@pytest.mark.parametrize("name", case_names("vscan") + case_names("vscan_qwen"))
def test_vscan(name: str) -> None:
    """With a CLS token, and by the rule for Qwen2.5-VL."""
    case = read_case(name)
    count, kind = case.settings["num_kept"], "received" if name.startswith("vscan_qwen") else "cls"
    given = ("in.shallow_received", "in.deep_received")
    if kind == "cls":
        given = ("in.shallow_cls_attention", "in.deep_cls_attention")
    shallow, deep = (case[key].reshape(-1, case[key].shape[-1]).mean(dim=0) for key in given)
    inputs = inputs_of(
        case, embeds=case["in.embeds"], layers={f"{kind}_attention@0.25": shallow}, **{f"{kind}_attention": deep}
    )
    selector = make_selector("vscan", {"attention": kind})
    assert (case.settings["window"], case.settings["local_ratio"]) == ({"cls": 6, "received": 4}[kind], 0.5)
    selection = selector.select(inputs, count)
    kept, num_local = selection.order[:count], len(case["out.local"])
    assert sorted(kept[:num_local].tolist()) == case.kept("out.local")
    assert kept[num_local:].tolist() == case["out.global"].tolist()
    assert sorted(kept.tolist()) == case.kept()
    assert selection.slots.tolist() == kept.tolist()
    case.close("out.tokens", selection.features[np.argsort(kept)])


@cases("trim_auto")
def test_trim_with_the_number_that_its_rule_gives(case: Case) -> None:
    """The released rule for the number of tokens is not ours; with that number, what is kept is the same."""
    number = len(case["out.kept"])
    assert case.settings["num_kept"] == number + 1, "the mean token comes on top"
    similarity = case["in.similarity"]
    low, high = np.percentile(similarity.numpy(), [25, 75])
    outliers = int((similarity > high + 1.5 * (high - low)).sum())
    assert number == int(len(similarity) * (outliers / len(similarity)))
    assert sorted(descending(similarity)[:number].tolist()) == case.kept()


@pytest.mark.parametrize("name", case_names("prumerge_plus") + case_names("prumerge"))
def test_prumerge(name: str) -> None:
    """Outliers and merging; in between, the released stride gives the number of tokens, here the number is given."""
    case = read_case(name)
    inputs = inputs_of(
        case,
        last_cls_attention=case["in.last_cls_attention"],
        last_keys=case["in.last_keys"][1:],
        features=case["in.features"],
    )
    outliers = case.settings["outliers_kept"]
    selector = make_selector("prumerge_plus")
    selection = selector.select(inputs, case.settings["num_tokens"])
    theirs = case["out.index"].tolist()
    assert selection.order[:outliers].tolist() == theirs[:outliers]
    if case.settings["step"] is None:  # nothing but outliers, and the summary
        assert selection.order[: len(theirs)].tolist() == theirs
        case.close("out.tokens", selection.features)
    else:
        kept = np.array(theirs)
        dropped = np.setdiff1d(np.arange(inputs.num_visual_tokens), kept)
        case.close("out.tokens", selector.merge(inputs, kept, dropped, summary=True))


@cases("prunesid")
def test_prunesid(case: Case) -> None:
    """LLaVA's form, whose CLS token takes the place of a dropped one, and Qwen-VL's."""
    count, score = case.settings["num_kept"], case.settings["score"]
    if score == "loading":
        kept = kept_of("prunesid", inputs_of(case, embeds=case["in.embeds"]), case, score=score)
        assert sorted(kept) == case.kept()
        return
    cls, states = case["in.states"][:1], case["in.states"][1:]
    attention = case["in.cls_attention"].mean(dim=0)
    inputs = inputs_of(case, features=states, cls_feature=cls.expand_as(states), cls_attention=attention)
    selection = make_selector("prunesid").select(inputs, count)
    (slot,) = selection.slots.tolist()
    assert slot not in case.kept()
    assert sorted(selection.order[:count].tolist()) == sorted([slot, *case.kept()])
    torch.testing.assert_close(selection.features, cls)


@cases("flowcut")
def test_flowcut(case: Case) -> None:
    """The tower of a tiny CLIP, layer by layer as many tokens as the released code has, and the same ones at last."""
    tower = tiny_clip(case).vision_model
    layers, lengths = tower.encoder.layers, []
    view = TowerView(tower, layers, len(layers) - 2, True, 32, 7, None, None, None)
    patch = FlowCutPatch(view, case.settings["num_kept"])
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1])) for layer in layers
    ]
    try:
        with torch.no_grad():
            states = tower(case["in.pixels"], output_hidden_states=True).hidden_states[-2][0, 1:]
    finally:
        patch.restore()
        for hook in hooks:
            hook.remove()
    kept = patch.run.values["tower_sizes"][0, :, 0].nonzero()[:, 0]
    assert kept.tolist() == case.kept()
    assert lengths == case["out.lengths"].tolist()[:-1]
    case.close("out.features", states[kept])


@cases("flowcut_tiles")
def test_flowcut_on_tiles(case: Case) -> None:
    """The tiles of an image without padding: as many patches leave of each, but not the same ones."""
    tower, s, lengths = tiny_clip(case).vision_model, case.settings, []
    layers, grid = tower.encoder.layers, (s["tiles"], (s["clip_config"]["vision_config"]["image_size"] // 4) ** 2)
    view = TowerView(tower, layers, len(layers) - 2, True, 32, 4, None, None, None)
    patch = FlowCutPatch(view, s["per_tile"] * s["tiles"], lambda: [torch.ones(grid, dtype=torch.bool)])
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1])) for layer in layers
    ]
    try:
        with torch.no_grad():
            states = tower(case["in.pixels"], output_hidden_states=True).hidden_states[-2][:, 1:]
    finally:
        patch.restore()
        for hook in hooks:
            hook.remove()
    kept = patch.run.values["tower_sizes"][..., 0] > 0
    assert [row.nonzero()[:, 0].tolist() for row in kept] == case["out.kept"].tolist()
    assert lengths == [length for length in case["out.lengths"].tolist() for _ in range(s["tiles"])]
    case.close("out.features", states[kept].view_as(case["out.features"]))


@cases("flowcut_qwen")
def test_flowcut_on_qwen2_vl(case: Case) -> None:
    """Block by block as many patches, and the tokens that the merger makes of what is left, in their places."""
    tower, (_, rows, columns), lengths = tiny_qwen_tower(case), case.settings["grid_thw"], []
    adapter = types.SimpleNamespace(
        vision_tower=tower,
        patches_per_token=4,
        vision_watch=types.SimpleNamespace(current=lambda: None),
        token_grids=lambda call: [((rows // 2, columns // 2),)],
    )
    patch = PackedFlowCutPatch(adapter, case.settings["num_kept"])
    hooks = [
        block.mlp.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0]))) for block in tower.blocks
    ]
    try:
        with torch.no_grad():
            tokens = tower(case["in.pixels"], grid_thw=torch.tensor([case.settings["grid_thw"]])).pooler_output
    finally:
        patch.restore()
        for hook in hooks:
            hook.remove()
    assert lengths == case["out.lengths"].tolist()[:-1]
    case.close("out.tokens", tokens[: case.settings["num_kept"]])


@cases("tome")
def test_tome(case: Case) -> None:
    """Step by step; without a CLS token the released code lists the even tokens that stay by score."""
    states, size = case["in.x"], torch.ones(*case["in.x"].shape[:2], 1)
    for step, number in enumerate(case.settings["r"]):
        metric = case[f"in.keys.{step}"].mean(dim=2)
        ours = torch.cat(merge_most_similar(states, metric, size, number, case.settings["cls"])[:2], dim=-1)
        states, size = case[f"out.x.{step}"], case[f"out.size.{step}"]
        theirs = torch.cat([states, size], dim=-1)
        if not case.settings["cls"]:
            ours, theirs = (rows[:, rows[0, :, 0].sort().indices] for rows in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@cases("tome_schedule")
def test_tome_schedule(case: Case) -> None:
    """Solved for the number of tokens that the paper's ``r`` leaves: the same merges where that is constant."""
    left, merges = case.settings["tokens"], []
    for asked in case["out.r"].tolist():  # one token more, CLS, is in the layer: (t - 1) // 2
        merges.append(min(asked, left // 2))
        left -= merges[-1]
    ours = merge_schedule(case.settings["tokens"], left, len(merges))
    assert sum(ours) == sum(merges)
    assert (list(ours) == merges) == (len(set(case["out.r"].tolist())) == 1)


# -- by CLIP's text encoder -------------------------------------------------------------------------------------------


class FixedText:
    """Stands in for CLIP's text encoder where a case gives its output."""

    def __init__(self, case: Case) -> None:
        self.case, self.pieces_of = case, case["in.text_embeds"]
        self.project_patches = partial(ClipText.project_patches, self)
        self.model = types.SimpleNamespace(visual_projection=torch.nn.Linear(1, 1, bias=False))
        self.model.visual_projection.weight = torch.nn.Parameter(case["in.visual_projection"], requires_grad=False)

    def pieces(self, text: str) -> torch.Tensor:
        return self.pieces_of

    beginning = pieces


def normed_states(case: Case) -> torch.Tensor:
    states = case["in.states"]
    weight, bias = case["in.post_layernorm.weight"], case["in.post_layernorm.bias"]
    return torch.nn.functional.layer_norm(states, states.shape[-1:], weight, bias, case.settings["layer_norm_eps"])


@cases("cdpruner")
def test_cdpruner(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FixedText(case)
    monkeypatch.setattr("dop_search.selectors.clip_text.clip_text", lambda *arguments: encoder)
    inputs = inputs_of(case, patch_states=normed_states(case), embeds=case["in.embeds"])
    case.close("out.image_embeds", encoder.project_patches(inputs.patch_states))
    selector = make_selector("cdpruner", {"clip": "given"})
    relevance = normalised(finite_array(selector.similarity_to_text(inputs)))
    case.close("out.relevance", torch.from_numpy(relevance))
    assert kept_of("cdpruner", inputs, case, clip="given") == case["out.order"].tolist()


@cases("trim")
def test_trim(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dop_search.selectors.clip_text.clip_text", lambda *arguments: FixedText(case))
    inputs = inputs_of(case, patch_states=normed_states(case), features=case["in.states"])
    selector, count = make_selector("trim", {"clip": "given"}), case.settings["num_kept"]
    case.close("out.similarity", selector.relevance(inputs).softmax(dim=0))
    selection = selector.select(inputs, count)
    kept = sorted(selection.order[: count - 1].tolist())
    assert kept == case.kept()
    assert (selection.space, selection.slots.tolist()) == ("features", [selection.order[count - 1]])
    tokens = torch.cat([case["in.states"][kept], selection.features])
    case.close("out.tokens", tokens)
    w1, b1, w2, b2 = (case[f"in.projector.{name}"] for name in ("w1", "b1", "w2", "b2"))
    linear = torch.nn.functional.linear
    case.close("out.embeds", linear(torch.nn.functional.gelu(linear(tokens, w1, b1)), w2, b2))


def encoder_of(case: Case, clip) -> ClipText:
    """CLIP with a tokenizer that gives the case's ids, and cuts them as tokenizers of transformers do."""
    ids = case["in.text_ids"].tolist()

    def tokenizer(text: str, truncation: bool = False, max_length: int | None = None) -> dict[str, list[int]]:
        if truncation and max_length is not None and len(ids) > max_length:
            return {"input_ids": [*ids[: max_length - 1], ids[-1]]}
        return {"input_ids": ids}

    return ClipText(clip, tokenizer)


def seen_in(model, case: Case) -> SelectorInputs:
    """What the tower of a whole model shows to selectors, by the adapter's own captures."""
    adapter, shown = adapter_for(model), {}
    handles = [adapter.capture(name, partial(shown.__setitem__, name)) for name in ("patch_states", "features")]
    count = case.settings["grid"][0] * case.settings["grid"][1]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[2, *[1] * count, 3]]), pixel_values=case["in.pixel_values"])
            embeds = adapter.encode_images(case["in.pixel_values"])
    finally:
        for handle in handles:
            handle.remove()
    return inputs_of(case, embeds=embeds, text="given", **shown)


@cases("cdpruner_clip")
def test_cdpruner_end_to_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tiny_clip(case)
    encoder = encoder_of(case, clip)
    monkeypatch.setattr("dop_search.selectors.clip_text.clip_text", lambda *arguments: encoder)
    inputs = seen_in(tiny_llava(case, clip), case)
    case.close("out.text_embeds", encoder.pieces(""))
    case.close("out.image_embeds", encoder.project_patches(inputs.patch_states))
    selector = make_selector("cdpruner", {"clip": "given"})
    case.close("out.relevance", torch.from_numpy(normalised(finite_array(selector.similarity_to_text(inputs)))))
    assert kept_of("cdpruner", inputs, case, clip="given") == case["out.order"].tolist()


@cases("trim_clip")
def test_trim_end_to_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = tiny_clip(case)
    encoder = encoder_of(case, clip)
    monkeypatch.setattr("dop_search.selectors.clip_text.clip_text", lambda *arguments: encoder)
    model = tiny_llava(case, clip)
    inputs, count = seen_in(model, case), case.settings["num_kept"]
    case.close("out.text_embeds", encoder.beginning(""))
    selector = make_selector("trim", {"clip": "given"})
    case.close("out.similarity", selector.relevance(inputs).softmax(dim=0))
    selection = selector.select(inputs, count)
    assert sorted(selection.order[: count - 1].tolist()) == case.kept()
    with torch.no_grad():
        mean = adapter_for(model).tower_view.project(selection.features)[0]
    case.close("out.mean_embed", mean)


def test_a_long_text_is_cut_into_raw_pieces() -> None:
    """As the released code: only the first piece begins with the begin token, only the last one has the end token."""
    case = read_case("trim_clip-2")
    clip, ids = tiny_clip(case), case["in.text_ids"].tolist()
    assert len(ids) > 77
    with torch.no_grad():
        raw = [clip.get_text_features(input_ids=torch.tensor([ids[start : start + 77]])) for start in (0, 77)]
    expected = torch.cat([getattr(part, "pooler_output", part) for part in raw])
    torch.testing.assert_close(encoder_of(case, clip).pieces(""), expected, rtol=1e-4, atol=1e-5)


def test_greedy_map_stops_where_the_kernel_ends() -> None:
    assert greedy_map(np.ones((4, 4)), 3).tolist() == [0]

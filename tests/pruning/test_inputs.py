"""Inputs of every form that the model itself takes: right, or refused by name."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from support.tiny_inputs import tiny_inputs, tiny_sample
from support.tiny_models import tiny_model

import dop_search as dop
from dop_search.models import adapter_for
from dop_search.pruning.packed import find_packing
from dop_search.testing.conformance.base import max_difference, max_text_difference
from dop_search.testing.conformance.decoding import generate_arguments
from dop_search.testing.inputs import collate, pack_rows
from dop_search.testing.reference import append_tokens, masked_forward, text_positions, visual_positions
from dop_search.testing.strategies import CORNERS, corner_strategy, random_rankings
from dop_search.utils.errors import DopError, UnsupportedModelError

LAYERS = 4
TOLERANCE = 2e-5
SOME_CORNERS = ("no_operation", "half_of_the_tokens", "layer_sets")
model_of = cache(tiny_model)
UNLIKE = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"),
    *("qwen3_vl_moe", "smolvlm"),
)
"""Families of different positions, placements of images, decoders and names of modules."""
families = pytest.mark.parametrize("family", UNLIKE)


def strategy(selector="uniform_grid", num_kept=8, **options):
    return dop.Strategy.depthwise(LAYERS, 2, 3, 1, num_kept, selector=selector, selector_options=options)


def rankings_of(model, inputs):
    return random_rankings(visual_positions(model, inputs["input_ids"]).sum(dim=1).tolist(), 3)


def embeds_of(model, inputs):
    return model.get_input_embeddings()(inputs["input_ids"]).detach()


def merged_embeds(model, inputs):
    """What the decoder receives, image features in their places."""
    seen = []
    with (
        torch.no_grad(),
        adapter_for(model).text_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        ),
    ):
        model(**inputs)
    return seen[0]


def generated(model, **arguments):
    output = model.generate(**arguments, **generate_arguments(model), do_sample=False)
    return torch.stack(output.logits, dim=1)


# -- packed rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@families
def test_packed_text_equals_packed_text_of_the_plain_model(family, backend):
    """Rows of text alone, two per batch; where transformers sees one sequence (a cache, a mask), so does pruning."""
    model = tiny_model(family, attn_implementation=backend)
    ids = torch.randint(20, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    if "qwen" in family:
        positions = positions[None].expand(4, -1, -1)
    one = torch.ones_like(ids)
    calls = ({"use_cache": False}, {"use_cache": True}, {"use_cache": False, "attention_mask": one}, {})
    with torch.no_grad():
        expected = [model(input_ids=ids, position_ids=positions, **call).logits for call in calls]
        with dop.pruned(model, strategy(num_kept=3)):
            logits = [model(input_ids=ids, position_ids=positions, **call).logits for call in calls]
    for ours, plain in zip(logits, expected, strict=True):
        assert max_difference(ours, plain) < TOLERANCE
    assert max_difference(expected[0], expected[1]) > 0.1


def test_lengths_of_packing_collators_are_respected_or_refused():
    model = model_of("llava")
    samples = [tiny_sample(model, 3, 4), tiny_sample(model, 2, 2, seed=1)]
    packed, ends = pack_rows(model, samples), torch.tensor([0, 23, 43], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 23, "max_length_k": 23}
    with torch.no_grad(), dop.pruned(model, strategy()):
        expected = model(**packed, use_cache=False).logits
        assert torch.equal(model(**packed, use_cache=False, **lengths).logits, expected)
        for wrong in ({"use_cache": True}, {"position_ids": torch.arange(43)[None]}):
            with pytest.raises(DopError, match=r"`cu_seq_lens_q` says that sequences end at \[23, 43\].*say \[43\]"):
                model(**{**packed, "use_cache": False, **lengths, **wrong})


def test_packed_rows_with_a_cache_are_refused_where_kernels_would_pack_them():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert find_packing(positions, (1, 5), True, "sdpa", {}) is None
    with pytest.raises(DopError, match=r"packed rows.*fill no cache"):
        find_packing(positions, (1, 5), True, "flash_attention_2", {})


# -- embeddings instead of tokens ----------------------------------------------------------------------------------


@families
def test_embeddings_of_the_prompt_are_as_good_as_its_tokens(family):
    """Placeholders are known by their embedding, as in transformers, which has other positions then for Qwen."""
    model = model_of(family)
    inputs = tiny_sample(model, 3, 4)
    by_embeds = {name: value for name, value in inputs.items() if name not in ("input_ids", "mm_token_type_ids")}
    by_embeds["inputs_embeds"] = embeds_of(model, inputs)
    if "qwen" in family:
        by_embeds["position_ids"] = pack_rows(model, [inputs])["position_ids"]
    rankings = rankings_of(model, inputs)
    for corner in SOME_CORNERS:
        with torch.no_grad(), dop.pruned(model, corner_strategy(corner, LAYERS), rankings):
            expected, logits = model(**inputs).logits, model(**by_embeds).logits
        assert max_difference(logits, expected) < TOLERANCE


@families
def test_generate_takes_embeddings_beside_tokens(family):
    """With placeholders and pixels, or with the images' features already in their places."""
    model = model_of(family)
    inputs = tiny_inputs(model)
    tokens = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    rankings = rankings_of(model, inputs)
    with dop.pruned(model, corner_strategy("layer_sets", LAYERS), rankings):
        expected = generated(model, **inputs)
        beside = generated(model, **inputs, inputs_embeds=embeds_of(model, inputs))
    assert max_difference(beside, expected) < TOLERANCE
    if "qwen" not in family:  # which takes positions from the pixels' grids
        embeds = merged_embeds(model, inputs)
        with dop.pruned(model, corner_strategy("layer_sets", LAYERS), rankings):
            assert max_difference(generated(model, **tokens, inputs_embeds=embeds), expected) < TOLERANCE
            with pytest.raises(DopError, match="`prefill_chunk_size` cuts tokens, not `inputs_embeds`"):
                generated(model, **tokens, inputs_embeds=embeds, prefill_chunk_size=5)


def test_embeddings_that_show_no_image_are_refused():
    model = model_of("llava")
    inputs = tiny_inputs(model)
    embeds, mask = merged_embeds(model, inputs), inputs["attention_mask"]
    with dop.pruned(model, strategy()):
        for call in (model, model.generate):
            with pytest.raises(DopError, match=r"by the embedding of their placeholder.*give `input_ids` beside them"):
                call(inputs_embeds=embeds, attention_mask=mask)
        with pytest.raises(DopError, match=r"a pruned decoder is called by its model"):
            model.model.language_model(inputs_embeds=embeds)


# -- images hidden by the mask, images as a prefix, images that were not given ---------------------------------------


@pytest.mark.parametrize("family", [family for family in UNLIKE if "qwen" not in family])
def test_hidden_image_tokens_are_as_if_they_were_not_there(family):
    """Some of an image, one of two, both, by ``attention_mask=0``; Qwen's own positions do not allow for it."""
    model = model_of(family)
    inputs = tiny_sample(model, 3, 4, num_images=2)
    place = visual_positions(model, inputs["input_ids"])[0].nonzero()[:, 0]
    for hidden in (place[2:5], place[: len(place) // 2], place):
        mask = inputs["attention_mask"].clone()
        mask[0, hidden] = 0
        masked, rankings = {**inputs, "attention_mask": mask}, rankings_of(model, inputs)
        for corner in SOME_CORNERS:
            chosen = corner_strategy(corner, LAYERS)
            expected = masked_forward(model, masked, chosen, rankings)
            with torch.no_grad(), dop.pruned(model, chosen, rankings):
                logits = model(**masked).logits
            assert max_text_difference(model, masked, logits, expected) < TOLERANCE
        with torch.no_grad(), dop.pruned(model, strategy("received_attention", 3)):
            assert bool(model(**masked).logits.isfinite().all())


@pytest.mark.parametrize("before", [0, 3])
@families
def test_an_image_can_be_cached_as_a_prefix(family, before):
    """Image tokens alone, or text and image, then the question; the prefix ends in a token that runs everything."""
    model = model_of(family)
    prefix = tiny_sample(model, before, 0)
    question = torch.randint(20, 90, (1, 5), generator=torch.Generator().manual_seed(1))
    whole, length = append_tokens(prefix, question), prefix["input_ids"].shape[1]
    rankings = rankings_of(model, prefix)
    for corner in CORNERS:
        chosen = corner_strategy(corner, LAYERS)
        expected = masked_forward(model, whole, chosen, rankings, length)[:, length - 1 :]
        with torch.no_grad(), dop.pruned(model, chosen, rankings):
            first = model(**prefix, use_cache=True)
            second = model(input_ids=question, past_key_values=first.past_key_values)
        assert max_difference(torch.cat([first.logits[:, -1:], second.logits], dim=1), expected) < TOLERANCE


@pytest.mark.parametrize("selector", ["cls_attention", "divprune", "tome"])
def test_images_of_an_earlier_call_rank_nothing(selector):
    """Placeholders without pixels, or with features that were encoded elsewhere."""
    model = model_of("llava")
    inputs = tiny_sample(model, 3, 4)
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), dop.pruned(model, strategy(selector)):
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        for again in (tokens, {**tokens, "mm_encoder_outputs": {"image": features}}):
            model(**inputs)
            if selector == "divprune":  # goes by the decoder's input alone
                model(**again)
                continue
            with pytest.raises(DopError, match="pass `pixel_values`"):
                model(**again)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    ("family", "selector"),
    [
        ("llava", "cls_attention"),
        ("llava", "visionzip"),
        ("llava", "tome"),
        ("llava", "cdpruner_llm"),
        ("llava_next", "hired"),
        ("qwen2_5_vl", "received_attention"),
    ],
)
def test_generation_without_a_cache_keeps_the_ranking_of_its_prompt(family, selector, beams):
    """As with a cache, which keeps it by itself; two generations, of different images, in a row."""
    model = model_of(family)
    for seed in (0, 1):
        inputs = collate([tiny_sample(model, 3, 4, seed=seed), tiny_sample(model, 5, 4, seed=seed + 7)])
        arguments = {**inputs, "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
        with dop.pruned(model, strategy(selector, 7)):
            expected = model.generate(**arguments)
            assert model.generate(**arguments, use_cache=False).tolist() == expected.tolist()


# -- a prompt in chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["cls_attention", "divprune", "cdpruner_llm", "avg_pool", "visionzip", "resize"])
@pytest.mark.fast_cases(1)
def test_selectors_rank_the_whole_prompt_that_comes_in_chunks(selector):
    """Chunks that cut an image in two; what a selector merges stays where it belongs."""
    model = model_of("llava")
    inputs = tiny_inputs(model)
    with dop.pruned(model, strategy(selector, 7)):
        expected = generated(model, **inputs)
        beams = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        for chunk in (1, 6, 100):
            assert max_difference(generated(model, **inputs, prefill_chunk_size=chunk), expected) < TOLERANCE
            arguments = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "prefill_chunk_size": chunk}
            assert model.generate(**inputs, **arguments).tolist() == beams.tolist()


def test_a_conversation_goes_on_in_chunks():
    model = model_of("llava")
    inputs = tiny_sample(model, 3, 4)
    question = torch.randint(20, 90, (1, 7), generator=torch.Generator().manual_seed(1))
    answers = []
    for chunk in (None, 3):
        with dop.pruned(model, strategy("cls_attention", 7)):
            first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, do_sample=False)
            ids = torch.cat([first.sequences, question], dim=1)
            arguments = {"attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
            answers.append(generated(model, input_ids=ids, **arguments, prefill_chunk_size=chunk))
    assert max_difference(*answers) < TOLERANCE


def test_stages_refuse_chunks_by_name():
    model = model_of("llava")
    chosen = dop.Strategy.depthwise(
        LAYERS, [4, 1], [4, 1], [4, 1], shares=[0.5, 0.5], selector="fastv", selector_options={"stages": [1]}
    )
    with dop.pruned(model, chosen), pytest.raises(DopError, match=r"'fastv' ranks whole prompts.*`prefill_chunk_size`"):
        model.generate(**tiny_sample(model, 3, 4), max_new_tokens=2, prefill_chunk_size=4)


# -- labels ----------------------------------------------------------------------------------------------------------


def labels_of(model, inputs):
    return inputs["input_ids"].where(~visual_positions(model, inputs["input_ids"]), -100)


@families
def test_a_caption_is_learned_from_the_image_in_front_of_it(family):
    """``<image>caption``: the first word is read off the last visual token, which therefore runs everything."""
    model = tiny_model(family)
    image = tiny_sample(model, 0, 0)
    inputs = append_tokens(image, torch.randint(20, 90, (1, 6), generator=torch.Generator().manual_seed(1)))
    labels, length = labels_of(model, inputs), image["input_ids"].shape[1]
    labels[:, :length] = -100  # what a processor writes between tiles is text
    rankings = rankings_of(model, inputs)
    for corner in SOME_CORNERS:
        chosen = corner_strategy(corner, LAYERS)
        logits = masked_forward(model, inputs, chosen, rankings, length)[0, length - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits.float(), labels[0, length:])
        with dop.pruned(model, chosen, rankings):
            loss = model(**inputs, labels=labels).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_labels_at_visual_tokens_are_refused_and_forgotten():
    model = model_of("llava")
    inputs = tiny_inputs(model)
    with torch.no_grad(), dop.pruned(model, strategy()):
        expected = model(**inputs).logits
        with pytest.raises(DopError, match="`labels` must be -100 at visual tokens"):
            model(**inputs, labels=inputs["input_ids"])
        assert torch.equal(model(**inputs).logits, expected)
        labelled = model(**inputs, labels=labels_of(model, inputs)).logits
    after = text_positions(model, inputs)
    assert max_difference(labelled[after], expected[after]) > TOLERANCE, "the image's last token runs, and is seen"


# -- what a family lacks ---------------------------------------------------------------------------------------------


def test_blocks_with_full_attention_are_looked_for_within_the_tower():
    model = tiny_model("qwen2_5_vl")
    tower = model.model.visual
    blocks = list(tower.blocks)
    tower.fullatt_block_indexes = [0, 7, 15]
    assert adapter_for(model).received_attention_module() is blocks[0].attn
    tower.fullatt_block_indexes = [7, 15]
    with pytest.raises(UnsupportedModelError, match=r"it has 2 blocks and fullatt_block_indexes=\[7, 15\]"):
        dop.prune_(model, strategy("received_attention"))


def test_a_batch_pads_on_either_side():
    """The last real token of a sample is not the last of the row where padding comes after it."""
    model = model_of("llava")
    samples = [tiny_sample(model, 3, 0), tiny_sample(model, 6, 0, seed=1)]
    batch = collate(samples)
    length = samples[0]["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask"):
        batch[name][0] = batch[name][0].roll(length - batch[name].shape[1])
    rankings = rankings_of(model, batch)
    with torch.no_grad(), dop.pruned(model, corner_strategy("no_operation", LAYERS), rankings):
        together = model(**batch).logits
    for row, sample in enumerate(samples):
        with torch.no_grad(), dop.pruned(model, corner_strategy("no_operation", LAYERS), rankings[row : row + 1]):
            alone = model(**sample).logits[0, -1]
        assert max_difference(together[row, sample["input_ids"].shape[1] - 1], alone) < TOLERANCE
    assert np.all(batch["attention_mask"].sum(dim=1).numpy() == [length, length + 3])


# -- masks over what is cached ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["pruned", "plain"])
def test_a_mask_that_contradicts_the_cache_is_refused(prefix):
    """The plain model lets a mask hide what was shown before; a pruned cache holds what was kept under the first."""
    model, question = model_of("llava"), torch.tensor([[50, 51, 52]])
    inputs = collate([tiny_sample(model, 3, 4), tiny_sample(model, 6, 4, seed=1)])  # three pads
    question = question.expand(2, -1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(question)], dim=1)
    hides, shows = mask.clone(), torch.ones_like(mask)
    hides[:, :5] = 0
    for length in (3, 1):
        tokens = {"input_ids": question[:, :length]}
        with torch.no_grad(), dop.pruned(model, strategy() if prefix == "pruned" else dop.Strategy.full(LAYERS)):
            cache = model(**inputs, use_cache=True).past_key_values
        with torch.no_grad(), dop.pruned(model, strategy()):
            right = mask[:, : mask.shape[1] - 3 + length]
            first = model(**tokens, attention_mask=right, past_key_values=cache).logits
            cache.reorder_cache(torch.tensor([1, 0]))
            for wrong in (right, hides[:, : right.shape[1]], shows[:, : right.shape[1]], right[:, -length:]):
                longer = torch.cat([wrong, torch.ones(2, length, dtype=torch.long)], dim=1)
                with pytest.raises(DopError, match=r"`attention_mask` (hides or shows|must cover)"):
                    model(**tokens, attention_mask=longer, past_key_values=cache)
            swapped = torch.cat([right.flip(0), torch.ones(2, length, dtype=torch.long)], dim=1)
            assert bool(model(**tokens, attention_mask=swapped, past_key_values=cache).logits.isfinite().all())
        assert bool(first.isfinite().all())


def test_a_single_new_token_can_be_a_pad():
    """Samples of a batch that end earlier: what their pads are never reaches anyone."""
    model, inputs = model_of("llava"), tiny_sample(model_of("llava"), 3, 4)
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[0, 1]])], dim=1)
    seen = []
    for pad in (20, 77):
        with torch.no_grad(), dop.pruned(model, strategy()):
            cache = model(**inputs, use_cache=True).past_key_values
            model(input_ids=torch.tensor([[pad]]), attention_mask=mask[:, :-1], past_key_values=cache)
            seen.append(model(input_ids=torch.tensor([[50]]), attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*seen)

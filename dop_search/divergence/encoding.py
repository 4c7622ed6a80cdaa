"""What the decoder receives for each sample, captured once so that the vision tower never runs again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.prompts import image_tokens_checked, with_answer
from dop_search.models.tower import num_tokens
from dop_search.pruning.choosing import Choice, Chooser
from dop_search.pruning.layout import to_device
from dop_search.pruning.packed import Tokens
from dop_search.pruning.ranking import RankingSource, visual_counts
from dop_search.pruning.sight import Sight, sights_of
from dop_search.selectors import Selector
from dop_search.utils.attached import replace_attribute
from dop_search.utils.errors import DopError


@dataclass(frozen=True)
class EncodedSample:
    """One sample as the decoder sees it.

    Attributes:
        embeds: ``[length, hidden_size]`` text and projected visual tokens, prompt and teacher-forced answer.
        position_ids: ``[axes, length]``; one axis for RoPE, more for multimodal RoPE.
        visual: ``[length]`` boolean.
        prompt_length: tokens of the prompt; the answer's first token is predicted at ``prompt_length - 1``.
        ranking: visual tokens, best first.
        deepstack: per decoder layer from the first on ``[num_visual, hidden_size]``, added to the visual tokens after
            that layer; empty in most families.
        chooser: for selectors whose choice depends on the number of kept tokens; ``None``: the head of ``ranking``.
        images: visual tokens of each image; empty where the model cannot tell.
    """

    embeds: Tensor
    position_ids: Tensor
    visual: Tensor
    prompt_length: int
    ranking: np.ndarray
    deepstack: tuple[Tensor, ...] = ()
    chooser: Chooser | None = None
    images: tuple[int, ...] = ()

    def choice(self, num_kept: int) -> Choice:
        """Which visual tokens are kept when ``num_kept`` are, and what the decoder receives for merged ones."""
        if self.chooser is None:
            return Choice(self.ranking)
        return self.chooser(num_kept, lambda: self.embeds[self.visual])

    @property
    def ranked(self) -> np.ndarray:
        """``[length]`` boolean: visual tokens that a strategy decides about, all but one that ends the prompt."""
        ranked = self.visual.cpu().numpy().copy()
        ranked[self.prompt_length - 1] = False
        return ranked

    @property
    def length(self) -> int:
        """Tokens in the decoder."""
        return self.embeds.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory that it takes, without what a chooser remembers."""
        seen = () if self.chooser is None else self.chooser.tensors
        tensors = (self.embeds, self.position_ids, self.visual, *self.deepstack, *seen)
        return sum(tensor.nbytes for tensor in tensors)

    def to_host(self) -> EncodedSample:
        """The same in host memory, where all samples of a set have room."""
        return replace(
            self,
            embeds=self.embeds.cpu(),
            position_ids=self.position_ids.cpu(),
            visual=self.visual.cpu(),
            deepstack=tuple(features.cpu() for features in self.deepstack),
            chooser=None if self.chooser is None else self.chooser.to_host(),
        )

    @property
    def num_visual(self) -> int:
        """Visual tokens."""
        return int(self.visual.sum())

    @property
    def full_position_ids(self) -> Tensor:
        """``position_ids`` as the decoder takes them for a batch of one."""
        return self.position_ids if self.position_ids.shape[0] == 1 else self.position_ids[:, None]

    @property
    def read(self) -> np.ndarray:
        """``[length]`` boolean: positions whose logits predict an answer token."""
        positions = np.arange(self.length)
        return positions >= self.prompt_length - 1


class _DecoderReached(BaseException):
    """Carries the decoder's arguments out of the forward that was about to call it."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs


def _intercept(*args: Any, **kwargs: Any) -> None:
    raise _DecoderReached(kwargs)


@torch.inference_mode()
def encode(
    adapter: ModelAdapter, inputs: dict[str, Tensor], answer_ids: Sequence[int], selector: Selector
) -> EncodedSample:
    """Run one sample (batch of one, no padding) up to the decoder's door.

    Args:
        inputs: prompt with its images.
        answer_ids: teacher-forced answer; its last token is not fed, since nothing reads its output.
        selector: ranks the visual tokens from what the vision tower shows on the way.
    """
    if adapter.sees_images_whole and adapter.token_types not in inputs:
        raise DopError(
            f"{type(adapter.model).__name__} sees images as a whole by `{adapter.token_types}`, which its processor "
            f"makes; but got {sorted(inputs)}"
        )
    answer = torch.tensor([list(answer_ids[:-1])], dtype=inputs["input_ids"].dtype, device=inputs["input_ids"].device)
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    extended = with_answer(inputs, answer)
    text_model = adapter.text_model
    source = RankingSource(adapter, selector)
    with ExitStack() as undo:
        undo.callback(source.close)
        replace_attribute(undo, text_model, "forward", _intercept)
        try:
            with image_tokens_checked():
                adapter.multimodal(**extended)
        except _DecoderReached as reached:
            kwargs = reached.kwargs
    prompt_length = inputs["input_ids"].shape[1]
    prompt = torch.arange(ids.shape[1], device=ids.device)[None] < prompt_length  # the answer is nothing to select by
    visual = adapter.visual_token_mask(ids) & prompt
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
    deepstack = adapter.pop_deepstack(kwargs)
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:  # of a model that reads text alone the decoder is called with tokens
        embeds = text_model.embed_tokens(ids)
    tokens = Tokens(embeds, ids, visual, valid=prompt)
    source.prepare(tokens)
    chooser = None
    if selector.chooses_per_count and bool(visual.any()):
        (sample,) = source.sample_inputs(visual_counts(visual), tokens)
        sample = replace(sample, embeds=None)
        if selector.changes_tower:
            sizes = inputs.get(adapter.sizes_name)
            sample = replace(sample, pixel_values=inputs["pixel_values"], image_sizes=sizes)
        chooser = source.chooser(sample)
    return EncodedSample(
        embeds=embeds[0],
        position_ids=position_ids.reshape(-1, ids.shape[1]),
        visual=visual[0],
        prompt_length=prompt_length,
        ranking=source.rank(visual_counts(visual))[0],
        deepstack=deepstack,
        chooser=chooser,
        images=tuple(map(num_tokens, adapter.image_grids(visual_counts(visual))[0])) if adapter.knows_images else (),
    )


def rotary(adapter: ModelAdapter, sample: EncodedSample) -> tuple[Tensor, ...]:
    """Cosine and sine of the sample's positions, each ``[length, head_dim]``, on the decoder's device.

    With them go those of layers with a window, where they have others.
    """
    kind = torch.empty(0, dtype=sample.embeds.dtype, device=adapter.device)
    positions = sample.full_position_ids.to(adapter.device)
    return tuple(part[0] for part in (*adapter.rotary(kind, positions), *adapter.windowed_rotary(kind, positions)))


def sight(adapter: ModelAdapter, sample: EncodedSample) -> Sight | None:
    """Where the sample's tokens stand; ``None`` for decoders that are causal and see everything."""
    if not adapter.has_sight:
        return None
    visual = sample.visual.cpu().numpy()
    whole = visual if adapter.sees_images_whole else np.zeros_like(visual)
    return sights_of(0, whole[None], adapter.sees_images_in_windows)[0]


def full_states(adapter: ModelAdapter, sample: EncodedSample, length: int | None = None) -> Tensor:
    """The decoder as it is on a sample: its normed last states, ``[length, hidden_size]``.

    ``length``: tokens from the start, all of the prompt at least; ``None``: the answer as well.
    """
    end, device = len(sample.visual) if length is None else length, adapter.device
    embeds, visual = to_device(sample.embeds, device)[None, :end], sample.visual[None, :end].to(device)
    position_ids = sample.full_position_ids[..., :end].to(device)
    seen = sight(adapter, sample)
    masks: dict[str, Any] = {}
    if seen is not None:
        masks = adapter.mask_arguments(embeds, position_ids, torch.from_numpy(seen.image[None, :end]).to(device))
    states: Tensor = adapter.text_model(
        inputs_embeds=embeds,
        position_ids=position_ids,
        use_cache=False,
        **adapter.deepstack_arguments(visual, [features.to(device) for features in sample.deepstack]),
        **masks,
    ).last_hidden_state[0]
    return states

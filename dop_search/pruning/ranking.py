"""Rankings of the visual tokens of a batch, from what the vision tower and the decoder's input show."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dop_search.models.adapter import ModelAdapter
from dop_search.models.capture import field_and_layer
from dop_search.models.tower import TowerCapture, VisionWatch, each_sample, num_tokens
from dop_search.pruning.asking import attention_from_text, text_read_with_image
from dop_search.pruning.choosing import Choice, Chooser, as_choice, check_images, check_model, of_the_tower, patch_tower
from dop_search.pruning.packed import Tokens
from dop_search.selectors import Selector, SelectorInputs
from dop_search.selectors.base import TowerPatch
from dop_search.selectors.sharing import each_image, select_each
from dop_search.utils.attached import Attached
from dop_search.utils.errors import DopError

P = ParamSpec("P")
R = TypeVar("R")

_SPAN: ContextVar[Callable[[], AbstractContextManager[Any]]] = ContextVar("selection span", default=nullcontext)


@contextmanager
def selection_span(span: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter ``span()`` around each call that ranks or merges visual tokens before the decoder, to measure it."""
    token = _SPAN.set(span)
    try:
        yield
    finally:
        _SPAN.reset(token)


def _spanned(method: Callable[P, R]) -> Callable[P, R]:
    """The method inside what :func:`selection_span` has set."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _SPAN.get()():
            return method(*args, **kwargs)

    return run


class _Ranked(threading.local):
    """What the call that runs in this thread has shown.

    Attributes:
        captured: tower values by field.
        prepared: choices for the call that is under way.
        encoded: what ``generate()`` has encoded for the call.
        choices: the latest choices with what they are of: encoded images, and tokens ``[batch, length]``.
    """

    def __init__(self) -> None:
        self.captured: dict[str, Tensor] = {}
        self.prepared: list[Choice] | None = None
        self.encoded: list[weakref.ref[Any]] = []
        self.choices: tuple[list[weakref.ref[Any]], Tensor | None, list[Choice]] = ([], None, [])


class RankingSource(Attached):
    """Watches the vision tower for what a selector needs, and ranks each sample's visual tokens; UnsupportedModelError
    if the model lacks what the selector needs.

    Calls in several threads do not see each other's images.

    Args:
        selector: the criterion; ``None`` if rankings are given, or nothing is ranked before the decoder.
        rankings: fixed rankings, one per sample of the batch, instead of a selector.
        num_kept: tokens that a selector which changes the tower has to leave; ``None`` leaves the tower as it is.
        per_image: whether each image is ranked by itself.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        selector: Selector | None,
        rankings: Sequence[np.ndarray] | None = None,
        num_kept: int | None = None,
        per_image: bool = False,
    ) -> None:
        self.adapter, self.rankings, self.per_image = adapter, rankings, per_image
        self.selector = None if rankings is not None else selector
        self.handles: list[RemovableHandle | TowerCapture | VisionWatch] = []
        self.needs = frozenset[str]() if self.selector is None else self.selector.needs()
        self._local = _Ranked()
        self._patch: TowerPatch | None = None
        if self.selector is None:
            if per_image:  # the sizes of images are needed all the same
                self.handles.append(adapter.vision_watch.open())
            return
        check_model(adapter, self.selector)
        self.selector.prepare(adapter.tower_view.width if "patch_states" in self.needs else None)
        try:
            for name in sorted(self.captured_fields):
                self.handles.append(adapter.capture(name, partial(self._capture, name)))
            self.handles.append(adapter.vision_watch.open())
            if self.selector.changes_tower:
                self._patch = patch_tower(adapter, self.selector, num_kept)
        except DopError:
            self.close()
            raise

    @property
    def ranks(self) -> bool:
        """Whether tokens are ranked before the decoder."""
        return self.selector is not None or self.rankings is not None

    @property
    def captured_fields(self) -> frozenset[str]:
        """What the selector needs of the vision tower."""
        return of_the_tower(self.adapter, self.needs)

    @property
    def captured(self) -> dict[str, Tensor]:
        """Tower values of this thread's latest images, by field."""
        return self._local.captured

    def _capture(self, name: str, values: Tensor) -> None:
        self._local.captured[name] = values

    def read(self, input_ids: Tensor) -> None:
        """What this thread has encoded belongs to ``input_ids``, of which the decoder is about to get a part."""
        self.adapter.vision_watch.read(input_ids)
        for handle in self.handles:
            if isinstance(handle, TowerCapture):
                handle.deliver()

    def expect(self, input_ids: Tensor | None) -> None:
        """The images that this thread encodes next belong to these prompts, ``[batch, length]``."""
        if self._patch is not None and self.selector is not None and input_ids is not None:
            counts = visual_counts(self.adapter.visual_token_mask(input_ids))
            self._patch.run.images = tuple(
                check_images(self.adapter, self.selector, count) for count in counts if count
            )

    def begin(self, encoded: Mapping[str, Any] | None) -> None:
        """A call of the model begins in this thread, with images that ``generate()`` has ``encoded`` or others.

        The steps of a generation without a cache read the same ones, and keep the choices of the first.
        """
        local = self._local
        local.encoded = [weakref.ref(output) for output in (encoded or {}).values() if output is not None]
        if not local.encoded:
            self.forget()
        if [*map(id, local.encoded)] != [*map(id, local.choices[0])]:  # an object has one reference of this kind
            local.choices = ([], None, [])

    def forget(self) -> None:
        """This thread's images have been read, or come from an earlier call: a ranking has to have its own."""
        self._local.captured, self._local.prepared = {}, None
        for handle in self.handles:
            if not isinstance(handle, RemovableHandle):
                handle.forget()
        if self._patch is not None:
            self._patch.run.reset()

    def close(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self._patch is not None:
            self._patch.restore()

    @_spanned
    def prepare(self, tokens: Tokens, num_kept: Callable[[int], int] | None = None) -> Tensor:
        """Choose the tokens of each sample of a batch; :meth:`rank` and :meth:`images` then return what was chosen.

        Args:
            tokens: what the decoder is about to receive.
            num_kept: from the visual tokens of a sample, or of an image, to those kept; ``None``: all are.

        Returns:
            ``[batch, length, hidden_size]`` the embeddings, with the merged features of selectors that merge.
        """
        embeds, input_ids, visual = tokens.embeds, tokens.input_ids, tokens.visual
        if self.selector is None and not self.per_image:
            return embeds
        encoded, prompt, choices = self._local.encoded, *self._local.choices[1:]
        if prompt is None or not torch.equal(input_ids[:, : prompt.shape[1]], prompt):
            choices = self._choices(tokens, num_kept or (lambda count: count))
            self._local.choices = (encoded, input_ids if encoded else None, choices)
        self._local.prepared = choices
        if all(choice.embeds is None for choice in choices):
            return embeds
        embeds = embeds.clone()
        for row, choice in enumerate(choices):
            if choice.embeds is not None:
                place = visual[row].nonzero()[:, 0][torch.from_numpy(choice.slots).to(visual.device)]
                embeds[row, place] = choice.embeds.to(embeds.device, embeds.dtype)
        return embeds

    @_spanned
    def rank(self, num_visual: Sequence[int]) -> list[np.ndarray]:
        """One ranking per sample: of what was prepared last, or of all tokens by what the tower showed; DopError if the
        given rankings or the encoded images do not fit the batch.

        ``num_visual``: visual tokens per sample.
        """
        if self.rankings is not None:
            return self._given(len(num_visual))
        if self._local.prepared is not None:
            return [choice.order for choice in self._local.prepared]
        assert self.selector is not None
        return [
            self.selector.rank(inputs) if inputs.num_visual_tokens else np.empty(0, dtype=np.int64)
            for inputs in self.sample_inputs(num_visual)
        ]

    def images(self, num_visual: Sequence[int]) -> list[tuple[int, ...]]:
        """Visual tokens of what was ranked by itself in each sample: of all its images together, or of each."""
        choices = (self._local.prepared if self.per_image else None) or []
        return [choice.images for choice in choices] or [(count,) for count in num_visual]

    def chooser(self, inputs: SelectorInputs) -> Chooser:
        """Chooses for any number of kept tokens from the inputs of one sample."""
        assert self.selector is not None
        return Chooser(self.adapter, self.selector, inputs)

    def sample_inputs(self, num_visual: Sequence[int], tokens: Tokens | None = None) -> list[SelectorInputs]:
        """What the selector sees of each sample; without ``tokens`` of the tower alone. DopError if the encoded images
        do not fit the batch."""
        tower = {name: self._split(values, num_visual) for name, values in self._tower_values().items()}
        grids = self.adapter.image_grids(num_visual)
        tiles = self.adapter.token_tiles(num_visual) if "tiles" in self.needs else [None] * len(num_visual)
        result = []
        for index, count in enumerate(num_visual):
            inputs = SelectorInputs(num_visual_tokens=count, image_grids=sum(grids[index], ()))
            inputs = inputs.with_tensors({name: _squeeze(name, parts[index]) for name, parts in tower.items()})
            if (tiling := tiles[index]) is not None:
                inputs = replace(inputs, tiles=tiling[0], tile_grid=tiling[1][0] if len(tiling[1]) == 1 else None)
            result.append(inputs if tokens is None else self._with_decoder_inputs(inputs, tokens, index))
        return result

    def _choices(self, tokens: Tokens, num_kept: Callable[[int], int]) -> list[Choice]:
        """Of each sample, or of each of its images; see :meth:`prepare`."""
        counts, dtype = visual_counts(tokens.visual), tokens.embeds.dtype
        images = self.adapter.image_grids(counts) if self.per_image else [()] * len(counts)
        if self.selector is None:
            choices = [Choice(order) for order in self._given(len(counts))]
        else:
            seen = self.sample_inputs(counts, tokens)
            tiles = self.adapter.token_tiles(counts) if self.per_image and "tiles" in self.needs else None
            choices = []
            for index, (count, inputs) in enumerate(zip(counts, seen, strict=True)):
                if not count:
                    choices.append(Choice(np.empty(0, dtype=np.int64)))
                elif not self.per_image:
                    choices.append(self._choose(inputs, num_kept(count), dtype))
                else:
                    tiling = None if tiles is None else tiles[index]
                    parts = each_image(inputs, images[index], () if tiling is None else tiling[1])
                    selection = select_each(self.selector, parts, num_kept)
                    choices.append(as_choice(self.adapter, selection, dtype))
        return [
            replace(choice, images=tuple(map(num_tokens, grids))) for choice, grids in zip(choices, images, strict=True)
        ]

    def _choose(self, inputs: SelectorInputs, num_kept: int, dtype: torch.dtype) -> Choice:
        assert self.selector is not None
        if self.selector.changes_tower and 0 < num_kept < inputs.num_visual_tokens:
            check_images(self.adapter, self.selector, inputs.num_visual_tokens, inputs)
        if self._patch is None:
            return as_choice(self.adapter, self.selector.select(inputs, num_kept), dtype)
        if self._patch.run.num_runs == 0:
            raise DopError(
                f"{self.selector.name!r} changes what the vision tower computes, but the tower has not run in this "
                "call: pass `pixel_values` to the pruned model"
            )
        return Choice(self.selector.rank(inputs, num_kept))

    def _with_decoder_inputs(self, inputs: SelectorInputs, tokens: Tokens, index: int) -> SelectorInputs:
        embeds, visual = tokens.embeds[index], tokens.visual[index]
        valid = None if tokens.valid is None else tokens.valid[index]
        text = text_read_with_image(visual, valid)
        if "embeds" in self.needs:
            inputs = replace(inputs, embeds=embeds[visual].detach())
        if "text_embeds" in self.needs:
            inputs = replace(inputs, text_embeds=embeds[text].detach())
        if "received_attention" in self.needs & self.adapter.input_fields:
            asked = attention_from_text(self.adapter, embeds, visual, valid)
            inputs = replace(inputs, received_attention=asked)
        if "text" in self.needs:
            inputs = replace(inputs, text=self.adapter.decode_text(tokens.input_ids[index][text]))
        return inputs

    def _given(self, batch: int) -> list[np.ndarray]:
        assert self.rankings is not None
        if batch % len(self.rankings):
            raise DopError(f"`rankings` has {len(self.rankings)} entries, which do not fit a batch of {batch}")
        repeats = batch // len(self.rankings)  # beams and returned sequences repeat each sample
        return [np.asarray(ranking) for ranking in self.rankings for _ in range(repeats)]

    def _tower_values(self) -> dict[str, Tensor]:
        """Per field ``[visual tokens that the tower encoded, channels]``."""
        values = {name: value.reshape(len(value), -1) for name, value in self.captured.items()}
        if self._patch is not None:
            values |= {name: self.adapter.to_token_order(value) for name, value in self._patch.run.values.items()}
        missing = self.captured_fields - set(values)
        if missing:
            names = ", ".join(f"`{name}`" for name in sorted(missing))
            raise DopError(
                f"the selector needs {names} of the vision tower, which has not run in this call: "
                "pass `pixel_values` to the pruned model, or give `rankings=`"
            )
        return values

    def _split(self, values: Tensor, num_visual: Sequence[int]) -> list[Tensor]:
        if (parts := each_sample(num_visual, len(values))) is None:
            raise DopError(
                f"{sum(num_visual)} visual tokens in the batch do not match {len(values)} tokens encoded by the tower"
            )
        return [values[part] for part in parts]


def _squeeze(name: str, values: Tensor) -> Tensor:
    """Scores have one value per token, keys and features a vector."""
    kind, _ = field_and_layer(name)
    return values[:, 0] if kind.endswith("attention") or name == "tower_sizes" else values


def visual_counts(visual: Tensor) -> list[int]:
    """Visual tokens per sample of a ``[batch, length]`` mask."""
    return [int(count) for count in torch.sum(visual, dim=1).tolist()]

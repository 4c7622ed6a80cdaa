"""What scoring and generating take of memory: bytes of activations, by the sizes of the decoder and of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.quantization import stored_bytes
from dop_search.strategy.operations import LayerKind, ModelDims

TOWER_LAYER = 12
"""Activations of a layer of a vision tower, in its widths: input, norm, MLP of four widths before and after its
non-linearity, and what is left of attention."""
TOGETHER = 64
"""Strategies that are walked together; ``log2`` of it is how many states wait at most, see ``walk``."""
WAITING_STATES = TOGETHER.bit_length() - 1


@dataclass(frozen=True)
class SampleSize:
    """Tokens of one sample: text before the first image, text after it (with the answer), visual, and read ones."""

    prefix: int
    text: int
    visual: int
    answer: int

    @classmethod
    def of_prompt(cls, visual: Tensor, answer: int) -> SampleSize:
        """Of a prompt with visual tokens at ``visual`` (``[length]`` boolean) and an answer, the last token of which is
        not fed."""
        count, prefix = int(visual.sum()), min(int(visual.int().argmax()), len(visual) - 1)
        return cls(prefix, len(visual) - count - prefix + answer - 1, count, answer)

    @property
    def length(self) -> int:
        """Tokens in the decoder."""
        return self.prefix + self.text + self.visual


class Rows(NamedTuple):
    """Tokens of each sample that are in a layer's input, query, offer keys and go through the MLP."""

    present: Sequence[int]
    query: Sequence[int]
    keys: Sequence[int]
    mlp: Sequence[int]

    @classmethod
    def all(cls, lengths: Sequence[int]) -> Rows:
        """Every token does everything."""
        return cls(lengths, lengths, lengths, lengths)


@dataclass(frozen=True)
class Footprint:
    """What the decoder's activations take, in bytes.

    Attributes:
        element: bytes of an activation.
        eager: whether attention scores are written out, as the ``eager`` backend does.
        masks: whether prompts after a shared prefix need a mask, as everywhere but on a GPU.
        unpacked: the largest weight that is unpacked to be multiplied, with quantised weights.
        deepstack: layers after which vision features are added.
        sighted: whether every layer needs a mask, see :attr:`ModelAdapter.has_sight`.
    """

    dims: ModelDims
    element: int
    eager: bool = False
    masks: bool = False
    unpacked: int = 0
    deepstack: int = 0
    sighted: bool = False

    @classmethod
    def of(cls, adapter: ModelAdapter) -> Footprint:
        """Of a loaded model."""
        dims, element = adapter.dims, adapter.model.dtype.itemsize
        packed = any(stored_bytes(part) < part.numel() * element for part in adapter.layers[0].parameters())
        vision = getattr(adapter.model.config, "vision_config", None)
        return cls(
            dims,
            element,
            eager=adapter.text_config._attn_implementation == "eager",
            masks=adapter.device.type != "cuda",
            unpacked=cls.largest_weight(dims, element) if packed else 0,
            deepstack=len(getattr(vision, "deepstack_visual_indexes", None) or ()) if adapter.has_deepstack else 0,
            sighted=adapter.has_sight,
        )

    @staticmethod
    def largest_weight(dims: ModelDims, element: int) -> int:
        """The largest weight of a layer, unpacked."""
        return dims.hidden_size * max(dims.intermediate_size, dims.query_width) * element

    def states(self, num_tokens: int, num_layers: int = 1) -> int:
        """Hidden states before so many layers."""
        return num_tokens * self.dims.hidden_size * num_layers * self.element

    def layer(self, rows: Rows, past: int = 0) -> int:
        """The most that one layer holds at a time, its input among it.

        Args:
            rows: tokens of each sample that take part.
            past: keys of every sample that are already there.
        """
        return max(self._layer(rows, past, self.dims.of_kind(kind)) for kind in set(self.dims.kinds)) + self.unpacked

    def _layer(self, rows: Rows, past: int, dims: ModelDims) -> int:
        """Of layers with these sizes."""
        present, places = sum(rows.present), len(rows.query) * max(rows.query)
        hidden, query, keys = dims.hidden_size, dims.query_width, dims.kv_width
        offered = len(rows.keys) * max(rows.keys)
        uneven = min(rows.query) < max(rows.query) or min(rows.keys) < max(rows.keys)
        masked = uneven or self.eager or self.sighted or (self.masks and past > 0)
        given = present * (2 * hidden if sum(rows.query) == present else 3 * hidden)
        project = (
            given + sum(rows.query) * query + 2 * sum(rows.keys) * keys + max(places * 3 * query, offered * 3 * keys)
        )
        attend = present * hidden + 3 * places * query + 2 * (offered + len(rows.keys) * past) * keys
        if masked and keys < query:
            attend += 2 * (offered + len(rows.keys) * past) * query
        copied = 2 * places * query if uneven else 0
        mlp = 2 * present * hidden + places * query + copied + sum(rows.mlp) * (hidden + 3 * dims.mlp_width)
        attending = attend * self.element + self._scores(rows, past, masked)
        recurrent = self._recurrent(rows)
        return max((project + copied) * self.element, attending, mlp * self.element, recurrent)

    def _recurrent(self, rows: Rows) -> int:
        """The most that a recurrent layer holds at a time: features thrice (of a short convolution, which only a third
        of them enters, 5/3 times), and what its kernel works on."""
        if (sizes := self.dims.recurrent) is None:
            return 0
        places = len(rows.query) * max(map(max, zip(rows.query, rows.keys, strict=True)))
        states = 2 * sum(rows.present) * self.dims.hidden_size
        features = places * sizes.in_width * (9 if sizes.state_size else 5) // 3
        return (states + features) * self.element + 4 * places * sizes.working_size

    def layer_of(self, lengths: Sequence[int]) -> int:
        """The most that one layer of the full model holds at a time for samples of these lengths."""
        return self.layer(Rows.all(lengths))

    def _scores(self, rows: Rows, past: int, masked: bool) -> int:
        """Scores where they are written out, and masks as they are added to them."""
        count, pairs = len(rows.query), max(rows.query) * (max(rows.keys) + past)
        if self.eager:
            return count * pairs * self.dims.num_heads * max(2 * self.element, self.element + 4)
        even = min(rows.query) == max(rows.query) and min(rows.keys) == max(rows.keys) and not self.sighted
        return pairs * self.element * (1 if even else count) if masked else 0

    def arranged(self, lengths: Sequence[int], past: int = 0) -> int:
        """Rotary embeddings and masks of a chunk, arranged for its attention calls."""
        longest, count = max(lengths), len(lengths)
        pairs = longest * (longest + past)
        kinds = 2 if self.sighted else 1  # of layers, with tables and masks of their own
        width = max(self.dims.of_kind(kind).head_dim for kind in set(self.dims.kinds))
        tables = kinds * 13 * sum(lengths) * width * self.element
        if self.eager:
            return tables + kinds * 2 * count * pairs * self.element
        if min(lengths) < longest or self.sighted:
            return tables + kinds * 2 * count * pairs
        return tables + (2 * pairs if self.masks and past else 0)

    def logits(self, num_answer_tokens: int) -> int:
        """Logits at the answers' positions with their logarithms in float32, or four float32 terms and a mask of KL."""
        return num_answer_tokens * self.dims.vocab_size * max(self.element + 8, 17)

    def standing(self, lengths: Sequence[int], num_answer_tokens: int, past: int = 0) -> int:
        """What a chunk holds as long as it is worked on: its input, the full model's state on the way, the prefix, what
        the full model said.

        Args:
            lengths: tokens of each sample, those of the prefix left out.
            num_answer_tokens: of all samples.
            past: tokens of the prefix, which is held once.
        """
        known = num_answer_tokens * self.dims.vocab_size * 4
        states = self.states(sum(lengths), 2 + self.deepstack)
        return states + self.arranged(lengths, past) + self.cache(past) + known

    def chunk(self, sizes: Sequence[SampleSize]) -> int:
        """The most that scoring a chunk can take beside the hidden states that are kept: see :meth:`standing`, the
        states that wait, and a layer in which every token does everything, or the logits; with the text before the
        images apart or, as while that is computed, not."""
        answers, past = sum(size.answer for size in sizes), min(size.prefix for size in sizes)
        return max(self._chunk([size.length - its for size in sizes], answers, its) for its in {past, 0})

    def _chunk(self, lengths: Sequence[int], num_answer_tokens: int, past: int) -> int:
        working = max(self.layer(Rows.all(lengths), past), self.logits(num_answer_tokens))
        waiting = self.states(sum(lengths), WAITING_STATES)
        return self.standing(lengths, num_answer_tokens, past) + waiting + working

    def cache(self, num_tokens: int, num_samples: int = 1) -> int:
        """Keys and values of all layers, or their states."""
        dims, states = self.dims, 0
        if (sizes := dims.recurrent) is not None:
            states = len(sizes.layers) * (4 * sizes.state_size + sizes.window_size * self.element)
        attending = [dims.of_kind(kind) for kind in dims.kinds if kind != LayerKind.RECURRENT]
        return num_tokens * 2 * sum(its.kv_width for its in attending) * self.element + num_samples * states

    def generation(self, batch: int, length: int, max_new_tokens: int) -> int:
        """The most that ``generate()`` takes for prompts of one length."""
        logits = batch * self.dims.vocab_size * (self.element + 8)
        return (
            self.cache(batch * (length + max_new_tokens), batch)
            + self.states(batch * length)
            + max(self.layer(Rows.all([length] * batch)), logits)
        )

    def generated_together(self, free: int, length: int, max_new_tokens: int, tower: int = 0) -> int:
        """How many prompts of a length ``free`` bytes are enough for in ``generate()``; one at least.

        ``tower``: what the vision tower takes for the images of one.
        """
        one, two = (self.generation(batch, length, max_new_tokens) for batch in (1, 2))
        answering = 1 + max(0, free - one) // (two - one)
        return max(1, min(answering, free // tower)) if tower else answering


def num_patches(num_values: int, adapter: ModelAdapter) -> int:
    """Patches that ``num_values`` pixel values are, as the vision tower receives them."""
    frames = getattr(adapter.model.config.vision_config, "temporal_patch_size", 1)
    return int(num_values // (3 * frames * adapter.patch_size**2))


def tower_bytes(config: Any, width: int, patches: int, element: int) -> int:
    """Activations of a vision tower, with the states of all its layers where a family asks for one of them.

    Args:
        width: channels of the tower.
        patches: of all images.
        element: bytes of an activation.
    """
    vision = config.vision_config
    depth: int = getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0)
    states = depth + 1 if hasattr(config, "vision_feature_layer") else 1
    return patches * width * (states + TOWER_LAYER) * element

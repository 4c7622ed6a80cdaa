"""Validation samples packed for scoring: a chunk of samples, and its layouts per way of cutting the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dop_search.divergence.encoding import EncodedSample, rotary, sight
from dop_search.divergence.memory import hold, to_host
from dop_search.divergence.teacher import TeacherSample
from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.attention import ForwardTables
from dop_search.pruning.choosing import Choice
from dop_search.pruning.deepstack import Deepstack, visual_numbers
from dop_search.pruning.layer import run_layer
from dop_search.pruning.layout import DROPPED, TEXT, Layout, assign_groups, pack, to_device
from dop_search.pruning.recurrent import State
from dop_search.strategy import Strategy
from dop_search.strategy.steps import LayerStep

NO_GROUPS: frozenset[int] = frozenset()
Place = Literal["device", "host", "nowhere"]
"""Where the full model's hidden states are kept for the next call: on the device, in host memory, or nowhere: they are
computed again. The numbers do not depend on it."""

ChunkLayout = tuple[Layout, ForwardTables, Tensor | None, Deepstack | None]


class PrefixKeys:
    """What layers know of the text before the first image, which no strategy can change: keys and values, or a state.

    These tokens do not see the image, so their states are the full model's under every strategy.
    """

    def __init__(self, embeds: Tensor, known: Mapping[int, State], num_samples: int) -> None:
        self.embeds, self.known, self.num_samples = embeds, known, num_samples

    def state_of(self, layer_idx: int) -> State | None:
        """What a layer knows, of every sample."""
        first, second = (part.expand(self.num_samples, *part.shape[1:]) for part in self.known[layer_idx])
        return first, second

    def keep_state(self, layer_idx: int, state: State) -> None:
        """Nothing: the prefix is fixed."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Prepend the prefix to a layer's keys and values (``[num_samples, kv_heads, length, head_dim]``)."""
        past_key, past_value = (part.expand(self.num_samples, *part.shape[1:]) for part in self.known[layer_idx])
        return torch.cat([past_key, key_states], dim=2), torch.cat([past_value, value_states], dim=2)

    def shared(self, embeds: Tensor, num_samples: int) -> PrefixKeys | None:
        """The same for other samples that begin with the same text; ``None`` if they do not."""
        same = self.embeds.shape == embeds.shape and len(embeds) == 1 and torch.equal(self.embeds, embeds)
        return PrefixKeys(self.embeds, self.known, num_samples) if same else None


class _Recorder:
    """Remembers each layer's keys and values, or its state."""

    def __init__(self) -> None:
        self.known: dict[int, State] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.known[layer_idx] = key_states, value_states
        return key_states, value_states

    def state_of(self, layer_idx: int) -> State | None:
        return self.known.get(layer_idx)

    def keep_state(self, layer_idx: int, state: State) -> None:
        self.known[layer_idx] = state


class PackedChunk:
    """Some validation samples as packed rows, with the full model's hidden state before every layer.

    Rows hold the tokens from the first image on; the text before it is kept as keys and values only.

    Args:
        samples: teacher samples; similar lengths waste least.
        place: where the full model's hidden states of all layers (``layers × tokens × hidden_size``) are kept, from
            which a strategy starts at its first changed layer; see ``Place``.
        keep_prefix: leave the text before the image to its cached keys and values.
        known_prefix: keys and values of another chunk, taken over if its samples begin with the same text.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        samples: Sequence[TeacherSample],
        place: Place = "nowhere",
        keep_prefix: bool = True,
        known_prefix: PrefixKeys | None = None,
    ) -> None:
        self.adapter = adapter
        self.device = adapter.device
        self.samples = tuple(samples)
        self.place = place
        visual = [sample.encoded.visual.cpu().numpy() for sample in samples]
        first = [int(mask.argmax()) if mask.any() else 0 for mask in visual]
        read_from = [sample.encoded.prompt_length - 1 for sample in samples]
        self.num_past = min(*first, *read_from) if keep_prefix else 0
        ropes = [rotary(adapter, sample.encoded) for sample in samples]
        self.rope = [torch.cat([part[self.num_past :] for part in parts]) for parts in zip(*ropes, strict=True)]
        self._sights = [s for sample in samples if (s := sight(adapter, sample.encoded)) is not None] or None
        self.embeds = self._joined([sample.encoded.embeds[self.num_past :] for sample in samples])
        self.offsets = np.concatenate([[0], np.cumsum([s.encoded.length - self.num_past for s in samples])])
        self.num_answer_tokens = [len(sample.answer_ids) for sample in samples]
        self.log_probs = self._joined([sample.log_probs for sample in samples])
        self._visual = [mask[self.num_past :] for mask in visual]
        self._kept: list[Tensor] = []
        self._latest: tuple[int, Tensor] = (0, self.embeds)
        self._full_layout: ChunkLayout | None = None
        self.num_layers_computed = 0
        self._deepstack = [to_device(part, self.device) for part in _by_layer([sample.encoded for sample in samples])]
        self.reserved_bytes = self.hidden_bytes() if place == "device" else 0
        if place == "device":
            hold(self)
        self.prefix = self._prefix(ropes, known_prefix) if self.num_past else None

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return to_device(parts[0] if len(parts) == 1 else torch.cat(list(parts)), self.device)

    def _prefix(self, ropes: Sequence[tuple[Tensor, ...]], known: PrefixKeys | None) -> PrefixKeys:
        embeds = torch.stack([sample.encoded.embeds[: self.num_past] for sample in self.samples])
        if all(torch.equal(embeds[0], other) for other in embeds[1:]):
            embeds = embeds[:1]  # the same system prompt everywhere: once is enough
        if known is not None and (shared := known.shared(embeds, len(self.samples))) is not None:
            return shared
        count, length = embeds.shape[:2]
        text = [np.full(length, TEXT)] * count
        sights = None if self._sights is None else [its.at(slice(length)) for its in self._sights[:count]]
        layout, _ = pack(text, self.device, sights=sights)
        tables = ForwardTables(
            *(torch.cat([part[:length] for part in parts]) for parts in zip(*ropes[:count], strict=True))
        )
        cache, hidden = _Recorder(), to_device(embeds, self.device).flatten(0, 1)
        step = LayerStep(NO_GROUPS, NO_GROUPS, NO_GROUPS, NO_GROUPS)
        for layer in self.adapter.layers:
            hidden = run_layer(layer, hidden, NO_GROUPS, step, layout, tables, cache)
        return PrefixKeys(embeds, cache.known, len(self.samples))

    def layout(self, strategy: Strategy) -> ChunkLayout:
        """Layout for the strategy's kept tokens and groups, its rotary embeddings, the rows that enter it (``None``:
        all), and what is added to visual tokens after the first layers.
        """
        groups = [
            assign_groups(
                visual, self._choice(sample, strategy).order, strategy, sample.encoded.ranked[self.num_past :]
            )
            for visual, sample in zip(self._visual, self.samples, strict=True)
        ]
        layout, kept = pack(
            groups,
            self.device,
            read=[sample.encoded.read[self.num_past :] for sample in self.samples],
            num_past=self.num_past,
            sights=None if self._sights is None else [its.at(slice(self.num_past, None)) for its in self._sights],
        )
        rows = np.concatenate([o + k for o, k in zip(self.offsets[:-1], kept, strict=True)])
        injected = None
        if self._deepstack:
            injected = Deepstack(self._deepstack, layout, visual_numbers(np.concatenate(self._visual))[rows])
        if not any((group == DROPPED).any() for group in groups):
            return layout, ForwardTables(*self.rope), None, injected
        entry = layout.tensor(rows)
        tables = ForwardTables(*(part.index_select(0, entry) for part in self.rope))
        return layout, tables, entry, injected

    def entry_embeds(self, strategy: Strategy, entry: Tensor) -> Tensor:
        """The decoder's input at the rows ``entry``, with the features that the selector merges at this strategy."""
        embeds = self.embeds
        for offset, visual, sample in zip(self.offsets, self._visual, self.samples, strict=False):
            choice = self._choice(sample, strategy)
            if choice.embeds is not None:
                embeds = embeds.clone() if embeds is self.embeds else embeds
                place = torch.from_numpy(offset + np.flatnonzero(visual)[choice.slots]).to(embeds.device)
                embeds[place] = choice.embeds.to(embeds.device, embeds.dtype)
        return embeds.index_select(0, entry)

    @staticmethod
    def _choice(sample: TeacherSample, strategy: Strategy) -> Choice:
        return sample.encoded.choice(strategy.num_kept(sample.encoded.num_visual))

    def full_hidden(self, layer: int) -> Tensor:
        """The full model's hidden states before ``layer``: ``[rows, hidden_size]``; fastest in the order of layers."""
        if layer < len(self._kept):
            return self._kept[layer] if self.place == "device" else to_device(self._kept[layer], self.device)
        index, hidden = self._latest
        if index > layer:
            index, hidden = 0, self.embeds
        if index < len(self._kept):
            index, hidden = len(self._kept) - 1, self._kept[-1].to(self.device)
        self._latest = (0, self.embeds)  # else the state before would live as long as the one after it
        if self._full_layout is None:
            self._full_layout = self.layout(Strategy.full(self.adapter.dims.num_layers))
        layout, tables, _, injected = self._full_layout
        everything = frozenset({0})
        step = LayerStep(everything, everything, everything, everything)
        self._keep(index, hidden)
        for current in range(index, layer):
            hidden = run_layer(self.adapter.layers[current], hidden, everything, step, layout, tables, self.prefix)
            if injected is not None:
                hidden = injected.add(hidden, current, everything)
            self._keep(current + 1, hidden)
            self.num_layers_computed += 1
        self._latest = (layer, hidden)
        return hidden

    def _keep(self, layer: int, hidden: Tensor) -> None:
        if self.place != "nowhere" and layer == len(self._kept):
            self._kept.append(to_host(hidden) if self.place == "host" else hidden)

    def release(self) -> None:
        """Give up the hidden states that are kept, for good; they are computed again in every call."""
        self.place, self.reserved_bytes = "nowhere", 0
        self._kept.clear()
        self.rewind()

    def rewind(self) -> None:
        """Forget what is not kept, after a call."""
        self._latest, self._full_layout = (0, self.embeds), None

    def hidden_bytes(self) -> int:
        """What the hidden states of all layers take."""
        return self.embeds.nbytes * self.adapter.dims.num_layers


def _by_layer(encoded: Sequence[EncodedSample]) -> list[Tensor]:
    """Deepstack features of all samples per layer; a sample without images has none."""
    depth = max(len(sample.deepstack) for sample in encoded)
    none = encoded[0].embeds[:0]
    return [
        torch.cat([sample.deepstack[layer] if sample.deepstack else none for sample in encoded])
        for layer in range(depth)
    ]

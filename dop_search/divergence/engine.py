"""Exact KL of many strategies at once: shared prefixes computed once, from cached features, at answer positions only.

Where the time goes compared with a full forward of the model per strategy:

* vision tower and projector never run again (their output is in the teacher);
* a strategy starts at the first layer that it changes, from the full model's cached hidden state;
* strategies that agree up to some layer share it (depth-first walk over a trie of layer steps);
* the text before the image, which no strategy can change, is kept as keys and values;
* dead operations are never computed, and the last layer only computes what is read;
* ``lm_head`` runs at answer positions only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from dop_search.divergence.chunks import NO_GROUPS, HiddenStates, PackedChunk, chunks_by_length
from dop_search.divergence.teacher import Teacher
from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.attention import ForwardTables
from dop_search.pruning.deepstack import Deepstack
from dop_search.pruning.layer import run_layer
from dop_search.pruning.layout import Layout
from dop_search.pruning.steps import Groups, LayerStep, layer_steps
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.utils.errors import DopError, NumericalError

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
Divergence = Callable[[Tensor, Tensor], Tensor]
CPU_BATCH_SIZE = 8
ACCELERATOR_BATCH_SIZE = 32


@dataclass
class WorkCounter:
    """How many layer forwards were asked for, and how many were computed after sharing and early start."""

    layers_asked: int = 0
    layers_computed: int = 0


@dataclass(frozen=True)
class _Candidate:
    index: int
    steps: tuple[LayerStep, ...]


@dataclass
class _Walk:
    """One batch of strategies with the same kept tokens and groups, on one chunk."""

    chunk: PackedChunk
    strategy: Strategy
    layout: Layout
    tables: ForwardTables
    entry: Tensor | None
    injected: Deepstack | None
    all_groups: Groups
    share: bool
    early_start: bool
    results: dict[int, Tensor] = field(default_factory=dict)


class DivergenceEngine:
    """Scores strategies on a validation set.

    Args:
        adapter: the model, unpruned.
        teacher: the full model's view of the validation samples.
        batch_size: samples that are computed together; by default what fits the caches of a CPU, more elsewhere.
        averaging: ``"per_sample"`` averages over a sample's answer positions first, ``"per_token"`` weighs every
            answer token the same (the mean over all samples is then the mean over tokens).
        hidden_states: ``keep`` (default), ``offload`` or ``recompute`` the full model's; see ``HiddenStates``.
        divergence: what is averaged, instead of KL: a function of two log-probabilities, the full model's and the
            strategy's, each ``[num_positions, vocab_size]``, to ``[num_positions]``, or for ``K`` of them to
            ``[num_positions, K]``.
        share_prefixes, early_start, keep_prefix: switches for benchmarks; the numbers do not depend on them.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        teacher: Teacher,
        batch_size: int | None = None,
        averaging: str = "per_sample",
        hidden_states: HiddenStates = "keep",
        divergence: Divergence | None = None,
        share_prefixes: bool = True,
        early_start: bool = True,
        keep_prefix: bool = True,
    ) -> None:
        if averaging not in {"per_sample", "per_token"}:
            raise DopError(f"`averaging` must be per_sample or per_token, but got {averaging!r}")
        if hidden_states not in get_args(HiddenStates):
            raise DopError(f"`hidden_states` must be one of {get_args(HiddenStates)}, but got {hidden_states!r}")
        adapter.check_decoder()
        self.adapter, self.teacher = adapter, teacher
        self.batch_size = batch_size or (CPU_BATCH_SIZE if adapter.device.type == "cpu" else ACCELERATOR_BATCH_SIZE)
        self.averaging, self.divergence = averaging, divergence or kl_divergence
        self.hidden_states, self.share_prefixes, self.early_start = hidden_states, share_prefixes, early_start
        self.keep_prefix = keep_prefix
        self.work = WorkCounter()
        self._logged = False
        self._chunks: dict[tuple[int, ...], PackedChunk] = {}

    @property
    def num_samples(self) -> int:
        """Validation samples."""
        return len(self.teacher.samples)

    def __call__(self, strategies: Sequence[Strategy], sample_indices: Sequence[int] | None = None) -> np.ndarray:
        """Same as :meth:`evaluate`; the form that solvers take."""
        return self.evaluate(strategies, sample_indices)

    @torch.inference_mode()
    def evaluate(
        self,
        strategies: Sequence[Strategy],
        sample_indices: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> np.ndarray:
        """KL(full ‖ strategy) in nats, averaged over each sample's answer positions.

        Args:
            strategies: what to score; each must be for the model's number of layers.
            sample_indices: validation samples to score on; all by default.
            on_progress: called with (done, total) chunks.

        Returns:
            ``[num_strategies, num_samples]`` float64, in the order asked for; with another axis ``[K]`` if
            ``divergence`` has one.

        Raises:
            NumericalError: if a strategy's logits are not finite.
        """
        self._check(strategies)
        indices = list(range(self.num_samples)) if sample_indices is None else list(sample_indices)
        if not strategies:
            return np.zeros((0, len(indices)))
        place = {sample: position for position, sample in enumerate(indices)}
        parts = []
        chunks = self._chunks_of(indices)
        self._log_memory([chunk for _, chunk in chunks])
        for done, (_, chunk) in enumerate(chunks, start=1):
            parts.append(self._score_chunk(chunk, strategies))
            chunk.release_hidden()
            if on_progress is not None:
                on_progress(done, len(chunks))
        order = np.argsort([place[member] for members, _ in chunks for member in members])
        result = np.concatenate(parts, axis=1)[:, order]
        return result * self._weights(indices).reshape(-1, *[1] * (result.ndim - 2))

    @torch.inference_mode()
    def by_position(self, strategies: Sequence[Strategy]) -> list[list[np.ndarray]]:
        """The divergence at each answer position: per strategy and sample ``[num_answer_tokens]``, in nats for KL."""
        self._check(strategies)
        result = [[np.zeros(len(sample.answer_ids)) for sample in self.teacher.samples] for _ in strategies]
        for members, chunk in self._chunks_of(range(self.num_samples)):
            for index, parts in self._positions(chunk, strategies):
                for member, part in zip(members, parts, strict=True):
                    result[index][member] = part
            chunk.release_hidden()
        return result

    def _check(self, strategies: Sequence[Strategy]) -> None:
        ranked = [s for s in strategies if not s.stages and (s.num_visual_tokens is not None or len(s.groups) > 1)]
        for name, options in {(s.selector, json.dumps(dict(s.selector_options), sort_keys=True)) for s in ranked}:
            if make_selector(name, json.loads(options)) != self.teacher.selector:
                raise DopError(
                    f"a strategy with selector {name!r} {options} cannot be scored on tokens that "
                    f"{self.teacher.selector!r} has ranked; make a teacher with the strategy's selector, or change it "
                    "by dataclasses.replace(strategy, selector=..., selector_options=...)"
                )
        for strategy in strategies:
            if strategy.num_layers != self.adapter.dims.num_layers:
                raise DopError(
                    f"a strategy for {strategy.num_layers} layers cannot be scored on a model with "
                    f"{self.adapter.dims.num_layers}"
                )
            if strategy.stages:
                raise DopError(
                    f"selector {strategy.selector!r} ranks inside the decoder, which cached rankings cannot stand for; "
                    "score it with dop_search.baselines.plain_divergence"
                )

    def _log_memory(self, chunks: Sequence[PackedChunk]) -> None:
        if self._logged:
            return
        self._logged = True
        sizes = [chunk.hidden_bytes() for chunk in chunks]
        what = {
            "keep": f"kept on {self.adapter.device}, up to {sum(sizes) / 1e6:.0f} MB",
            "offload": f"kept in CPU memory, up to {sum(sizes) / 1e6:.0f} MB",
            "recompute": f"recomputed per call, up to {max(sizes) / 1e6:.0f} MB on {self.adapter.device} at a time",
        }
        log.info("hidden states of the full model on %d samples: %s", self.num_samples, what[self.hidden_states])

    def _weights(self, indices: Sequence[int]) -> np.ndarray:
        """Of the samples asked for, by all samples: a sample's value is the same whichever others are asked for."""
        if self.averaging == "per_sample":
            return np.ones(len(indices))
        counts = np.array([len(sample.answer_ids) for sample in self.teacher.samples], dtype=np.float64)
        return (counts / counts.mean())[list(indices)]

    def _chunks_of(self, indices: Sequence[int]) -> list[tuple[list[int], PackedChunk]]:
        lengths = [self.teacher.samples[index].encoded.length for index in indices]
        result = []
        everything = len(indices) == self.num_samples
        for part in chunks_by_length(lengths, self.batch_size):
            members = [indices[position] for position in part]
            key = tuple(members)
            chunk = self._chunks.get(key)
            if chunk is None:
                chunk = PackedChunk(
                    self.adapter,
                    [self.teacher.samples[member] for member in members],
                    hidden_states=self.hidden_states if everything else "recompute",
                    keep_prefix=self.keep_prefix,
                )
                if everything:
                    self._chunks[key] = chunk
            result.append((members, chunk))
        return result

    # -- one chunk --------------------------------------------------------------------------------

    def _score_chunk(self, chunk: PackedChunk, strategies: Sequence[Strategy]) -> np.ndarray:
        scores = {
            index: np.array([part.mean(axis=0) for part in parts])
            for index, parts in self._positions(chunk, strategies)
        }
        if len(scores) < len(strategies):  # the empty strategy is the full model itself
            parts = self._divergence(chunk, chunk.log_probs, Strategy.full(self.adapter.dims.num_layers))
            full = np.array([part.mean(axis=0) for part in parts])
            scores = dict.fromkeys(range(len(strategies)), full) | scores
        return np.stack([scores[index] for index in range(len(strategies))])

    def _positions(self, chunk: PackedChunk, strategies: Sequence[Strategy]) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Index and divergence per sample and answer position of each strategy that is not empty."""
        for bucket in _buckets(strategies):
            first = strategies[bucket[0]]
            layout, tables, entry, injected = chunk.layout(first)
            all_groups = frozenset(range(len(first.groups)))
            shortcuts = (self.share_prefixes, self.early_start)
            walk = _Walk(chunk, first, layout, tables, entry, injected, all_groups, *shortcuts)
            candidates = [
                _Candidate(index, layer_steps(strategies[index]))
                for index in bucket
                if entry is not None or not strategies[index].is_empty
            ]
            self.work.layers_asked += len(bucket) * self.adapter.dims.num_layers
            groups = [[candidate] for candidate in candidates] if not self.share_prefixes else [candidates]
            for group in groups:
                if group:
                    self._descend(walk, group, 0, None, walk.all_groups)
            for index, hidden in walk.results.items():
                logits = self.adapter.lm_head(self.adapter.text_model.norm(hidden)).float()
                yield index, self._divergence(chunk, logits.log_softmax(dim=-1), strategies[index])

    def _descend(
        self, walk: _Walk, candidates: Sequence[_Candidate], layer: int, hidden: Tensor | None, before: Groups
    ) -> None:
        """Walk the trie below one node. ``hidden`` is ``None`` while the full model's own states are still right."""
        num_layers = self.adapter.dims.num_layers
        if layer == num_layers:
            assert hidden is not None
            read = walk.layout.relative(NO_GROUPS, before, read_only=True)
            for candidate in candidates:
                walk.results[candidate.index] = hidden if read is None else hidden.index_select(0, read)
            return
        for part in _partition(candidates, layer):
            step = part[0].steps[layer]
            alive = frozenset().union(*(candidate.steps[layer].alive for candidate in part))
            step = LayerStep(alive, step.q, step.kv, step.mlp)
            full = step.q == step.kv == step.mlp == walk.all_groups
            if hidden is None and full and walk.early_start and walk.entry is None and layer < num_layers - 1:
                self._descend(walk, part, layer + 1, None, walk.all_groups)
                continue
            start = self._entry_hidden(walk, layer) if hidden is None else hidden
            self.work.layers_computed += 1
            after = run_layer(
                self.adapter.layers[layer],
                start,
                before,
                step,
                walk.layout,
                walk.tables,
                walk.chunk.prefix,
                read_only=layer == num_layers - 1,
            )
            if walk.injected is not None:
                after = walk.injected.add(after, layer, alive)
            self._descend(walk, part, layer + 1, after, alive)

    def _entry_hidden(self, walk: _Walk, layer: int) -> Tensor:
        if walk.entry is None:
            return walk.chunk.full_hidden(layer)
        assert layer == 0
        return walk.chunk.entry_embeds(walk.strategy, walk.entry)

    def _divergence(self, chunk: PackedChunk, log_probs: Tensor, strategy: Strategy) -> list[np.ndarray]:
        values = self.divergence(chunk.log_probs, log_probs).cpu().numpy()
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            at = np.repeat(np.arange(len(chunk.samples)), chunk.num_answer_tokens)[~finite][0]
            raise NumericalError(
                f"the pruned model's logits are not finite for sample {chunk.samples[at].id!r} under "
                f"{strategy.describe()!r} (dtype {self.adapter.model.dtype}); use dtype=float32 or bfloat16"
            )
        ends = np.cumsum(chunk.num_answer_tokens)
        return np.split(values.astype(np.float64), ends[:-1])


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p ‖ q)`` in nats over the last axis; zero where ``p`` is zero, never below zero."""
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), torch.zeros_like(log_p))
    return terms.sum(dim=-1).clamp_min(0.0)


def _buckets(strategies: Sequence[Strategy]) -> Iterable[list[int]]:
    """Strategies that keep the same tokens and cut them into the same groups."""
    buckets: dict[tuple[object, ...], list[int]] = {}
    for index, strategy in enumerate(strategies):
        key = (strategy.num_visual_tokens, tuple(policy.group.share for policy in strategy.groups))
        buckets.setdefault(key, []).append(index)
    return buckets.values()


def _partition(candidates: Sequence[_Candidate], layer: int) -> Iterable[list[_Candidate]]:
    """Candidates that do the same in this layer."""
    parts: dict[tuple[Groups, Groups, Groups], list[_Candidate]] = {}
    for candidate in candidates:
        step = candidate.steps[layer]
        parts.setdefault((step.q, step.kv, step.mlp), []).append(candidate)
    return parts.values()

"""Exact KL of many strategies at once: shared prefixes computed once, from cached features, at answer positions only.

Where the time goes compared with a full forward of the model per strategy:

* vision tower and projector never run again (their output is in the teacher);
* a strategy starts at the first layer that it changes, from the full model's cached hidden state;
* strategies that agree up to some layer share it (a walk over a trie of layer steps, see ``walk``);
* the text before the image, which no strategy can change, is kept as keys and values;
* dead operations are never computed, and the last layer only computes what is read;
* ``lm_head`` runs at answer positions only.

Memory is bounded: samples come in chunks that fit what is free, few states wait at a time, and the full model's states
are kept where there is room for them (see ``memory``). What does not fit after all is halved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dop_search.divergence.batches import Batches
from dop_search.divergence.chunks import NO_GROUPS, PackedChunk
from dop_search.divergence.footprint import TOGETHER
from dop_search.divergence.memory import Memory
from dop_search.divergence.teacher import Teacher
from dop_search.divergence.walk import Candidate, Emit, Load, Run, buckets, schedule
from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.attention import ForwardTables
from dop_search.pruning.deepstack import Deepstack
from dop_search.pruning.layer import run_layer
from dop_search.pruning.layout import Layout
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.steps import layer_steps
from dop_search.utils.errors import DopError, NumericalError

Progress = Callable[[int, int], None]
Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass
class WorkCounter:
    """How many layer forwards were asked for, and how many were computed after sharing and early start; and those of
    the full model that strategies started from."""

    layers_asked: int = 0
    layers_computed: int = 0
    full_layers: int = 0


@dataclass
class _Walk:
    """Strategies with the same kept tokens and groups, on one chunk."""

    chunk: PackedChunk
    strategy: Strategy
    layout: Layout
    tables: ForwardTables
    entry: Tensor | None
    injected: Deepstack | None


class DivergenceEngine:
    """Scores strategies on a validation set.

    Args:
        adapter: the model, unpruned.
        teacher: the full model's view of the validation samples.
        batch_size: most samples that are computed together; by default what memory and the processor's caches allow.
        averaging: ``"per_sample"`` averages over a sample's answer positions first, ``"per_token"`` weighs every
            answer token the same (the mean over all samples is then the mean over tokens).
        memory: GiB on the decoder's device, weights included, or ``auto``: most of what is free.
        keep_states: keep the full model's hidden states for later calls, as far as there is room.
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
        memory: Memory = "auto",
        keep_states: bool = True,
        divergence: Divergence | None = None,
        share_prefixes: bool = True,
        early_start: bool = True,
        keep_prefix: bool = True,
    ) -> None:
        if averaging not in {"per_sample", "per_token"}:
            raise DopError(f"`averaging` must be per_sample or per_token, but got {averaging!r}")
        adapter.check_decoder()
        self.adapter, self.teacher = adapter, teacher
        self.averaging, self.divergence = averaging, divergence or kl_divergence
        self.share_prefixes, self.early_start = share_prefixes, early_start
        self.batches = Batches(adapter, teacher, memory, keep_states, batch_size, keep_prefix)
        self.work = WorkCounter()

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
        """KL(full ‖ strategy) in nats, averaged over each sample's answer positions; NumericalError if a strategy's
        logits are not finite.

        Args:
            strategies: what to score; each must be for the model's number of layers.
            sample_indices: validation samples to score on; all by default.

        Returns:
            ``[num_strategies, num_samples]`` float64, in the order asked for; with another axis ``[K]`` if
            ``divergence`` has one.
        """
        self._check(strategies)
        indices = list(range(self.num_samples)) if sample_indices is None else list(sample_indices)
        if not strategies:
            return np.zeros((0, len(indices)))
        place = {sample: position for position, sample in enumerate(indices)}
        members: list[int] = []
        parts: list[np.ndarray] = []
        for its, part in self.batches.run(indices, lambda chunk: self._score_chunk(chunk, strategies)):
            members += its
            parts.append(part)
            if on_progress is not None:
                on_progress(len(members), len(indices))
        result = np.concatenate(parts, axis=1)[:, np.argsort([place[member] for member in members])]
        return result * self._weights(indices).reshape(-1, *[1] * (result.ndim - 2))

    @torch.inference_mode()
    def by_position(self, strategies: Sequence[Strategy]) -> list[list[np.ndarray]]:
        """The divergence at each answer position: per strategy and sample ``[num_answer_tokens]``, in nats for KL."""
        self._check(strategies)
        result = [[np.zeros(len(sample.answer_ids)) for sample in self.teacher.samples] for _ in strategies]
        everything = range(self.num_samples)
        for members, found in self.batches.run(everything, lambda chunk: list(self._positions(chunk, strategies))):
            for index, parts in found:
                for member, part in zip(members, parts, strict=True):
                    result[index][member] = part
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
            if strategy.per_image and any(len(sample.encoded.images) > 1 for sample in self.teacher.samples):
                raise DopError(
                    "a strategy that counts per image cannot be scored on samples of several images by cached "
                    "rankings, which are across them; score it with dop_search.baselines.plain_divergence"
                )
            if strategy.stages:
                raise DopError(
                    f"selector {strategy.selector!r} ranks inside the decoder, which cached rankings cannot stand for; "
                    "score it with dop_search.baselines.plain_divergence"
                )

    def _weights(self, indices: Sequence[int]) -> np.ndarray:
        """Of the samples asked for, by all samples: a sample's value is the same whichever others are asked for."""
        if self.averaging == "per_sample":
            return np.ones(len(indices))
        counts = np.array([len(sample.answer_ids) for sample in self.teacher.samples], dtype=np.float64)
        return (counts / counts.mean())[list(indices)]

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
        for bucket in buckets(strategies):
            first = strategies[bucket[0]]
            walk = _Walk(chunk, first, *chunk.layout(first))
            self.work.layers_asked += len(bucket) * self.adapter.dims.num_layers
            candidates = [
                Candidate(index, layer_steps(strategies[index]))
                for index in bucket
                if walk.entry is not None or not strategies[index].is_empty
            ]
            together = TOGETHER if self.share_prefixes else 1
            for start in range(0, len(candidates), together):
                yield from self._walk(walk, candidates[start : start + together], strategies)

    def _walk(
        self, walk: _Walk, candidates: Sequence[Candidate], strategies: Sequence[Strategy]
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        all_groups = frozenset(range(len(walk.strategy.groups)))
        states: dict[int, Tensor] = {}
        for operation in schedule(candidates, all_groups, self.early_start and walk.entry is None):
            if isinstance(operation, Emit):
                last = states.pop(operation.source)
                read = walk.layout.on(last.device).relative(NO_GROUPS, operation.before, read_only=True)
                last = last if read is None else last.index_select(0, read)
                values = self._divergence(walk.chunk, self._log_probs(last), strategies[operation.indices[0]])
                yield from ((index, values) for index in operation.indices)
            elif isinstance(operation, Load):
                states[operation.target] = self._entry_hidden(walk, operation.layer)
            else:
                self._run(walk, operation, states)

    def _run(self, walk: _Walk, operation: Run, states: dict[int, Tensor]) -> None:
        self.work.layers_computed += 1
        source = states.pop(operation.source) if operation.last else states[operation.source]
        hidden = run_layer(
            self.adapter.layers[operation.layer],
            source,
            operation.before,
            operation.step,
            walk.layout,
            walk.tables,
            walk.chunk.prefix,
            read_only=operation.layer == self.adapter.dims.num_layers - 1,
        )
        if walk.injected is not None:
            hidden = walk.injected.add(hidden, operation.layer, operation.step.alive)
        states[operation.target] = hidden

    def _log_probs(self, hidden: Tensor) -> Tensor:
        norm = self.adapter.final_norm
        normed = norm(hidden.to(norm.weight.device))
        return self.adapter.logits(normed).to(self.adapter.device).float().log_softmax(dim=-1)

    def _entry_hidden(self, walk: _Walk, layer: int) -> Tensor:
        if walk.entry is None:
            known = walk.chunk.num_layers_computed
            hidden = walk.chunk.full_hidden(layer)
            self.work.full_layers += walk.chunk.num_layers_computed - known
            return hidden
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

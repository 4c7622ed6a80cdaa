"""What a layer is handed: which rows each of its parts works on, and how queries and keys are arranged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Queries ``[start, stop)`` that see the keys ``[0, num_keys)``, causal from the bottom right."""

    start: int
    stop: int
    num_keys: int


@dataclass(frozen=True)
class AttentionPlan:
    """How the rows of one attention call are arranged as ``[sample, position]``.

    Attributes:
        num_samples, num_queries, num_keys: the padded shape; ``num_keys`` leaves out the keys that came before.
        num_past: keys of every sample that came before this layout and that all of its queries see.
        query_pad, key_pad: row of each padded place (``[num_samples * num_queries]``), ``None`` without padding.
        query_unpad: padded place of each row, ``None`` if no padding is needed.
        key_valid: ``[num_samples, num_keys]`` boolean, ``None`` if all keys are real.
        mask: ``[num_samples, 1, num_queries, num_past + num_keys]`` boolean, ``None`` if ``segments`` say it all.
        segments: runs of queries for which plain causal attention is right.
        query_rows: rows of the layout that issue a query (``[n]``), in packed order.
        key_rows: rows of the layout that are keys.
        window: how far back a query sees; ``None``: everything.
        query_places, key_places: ``[num_samples, length]`` where they stand; only with a window.
    """

    num_samples: int
    num_queries: int
    num_keys: int
    num_past: int
    query_pad: Tensor | None
    key_pad: Tensor | None
    query_unpad: Tensor | None
    key_valid: Tensor | None
    mask: Tensor | None
    segments: tuple[Segment, ...] | None
    query_rows: Tensor
    key_rows: Tensor
    window: int | None = None
    query_places: Tensor | None = None
    key_places: Tensor | None = None


@dataclass(frozen=True)
class RecurrentPlan:
    """How the rows that update the state of a recurrent layer, or read it, are arranged as ``[sample, position]``.

    Attributes:
        num_samples, length: the padded shape.
        place: where each row stands in it, flattened; ``None`` without padding.
        window: ``[taps, rows]`` what the convolution of each row sees, itself last: numbers of rows, after the
            ``num_samples * taps`` rows of what it remembers.
        tail: ``[num_samples * taps]`` what it remembers then, in the same numbers.
        updates: which rows change the state; ``None``: all.
        reads: places of the rows that read it; ``None``: all of the shape.
    """

    num_samples: int
    length: int
    place: Tensor | None
    window: Tensor
    tail: Tensor
    updates: Tensor | None
    reads: Tensor | None

    @property
    def num_taps(self) -> int:
        """Tokens that the convolution sees."""
        return len(self.window)

    def arranged(self, rows: Tensor) -> Tensor:
        """``[rows, ...]`` as ``[num_samples, length, ...]``; pads are zero."""
        if self.place is not None:
            spread = rows.new_zeros(self.num_samples * self.length, *rows.shape[1:])
            rows = spread.index_copy(0, self.place, rows)
        return rows.unflatten(0, (self.num_samples, self.length))


@dataclass(frozen=True)
class LayerPlan:
    """Which rows each part of one decoder layer works on; ``None`` stands for all rows that are there.

    Attributes:
        keep: rows of the layer's input that stay in the sequence.
        query, key, mlp: rows, among those that stay, that issue a query, offer a key and value, go through the MLP;
            ``key`` of a recurrent layer: that update its state or read it.
        attention: how queries and keys are arranged; ``None`` of a recurrent layer.
        recurrent: how the rows of a recurrent layer are arranged.
    """

    keep: Tensor | None
    query: Tensor | None
    key: Tensor | None
    mlp: Tensor | None
    attention: AttentionPlan | None
    recurrent: RecurrentPlan | None = None

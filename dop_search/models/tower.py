"""Watching a vision tower: what it encoded, what its attention showed, and for which visual token of the decoder.

transformers encodes images in two ways: inside the model's forward, and before it, in ``generate()``, once for all
beams. Both end in ``get_image_features`` or ``get_video_features``, and then in the decoder.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dop_search.utils.attached import Attached, replace_attribute
from dop_search.utils.errors import DopError

if TYPE_CHECKING:
    from dop_search.models.adapter import ModelAdapter

Grids = tuple[tuple[int, int], ...]
"""Rows and columns of consecutive pieces of visual tokens."""
Modality = Literal["image", "video"]
METHODS: dict[Modality, str] = {"image": "get_image_features", "video": "get_video_features"}


@dataclass(frozen=True)
class VisionCall:
    """One call of ``get_image_features`` or ``get_video_features`` with the arguments that were passed."""

    modality: Modality
    arguments: Mapping[str, Any]


@dataclass
class _Encoded:
    """What was encoded since the decoder last read images."""

    calls: dict[Modality, VisionCall] = field(default_factory=dict)
    read: bool = False


class _Seen(threading.local):
    """What the latest call of this thread has shown: calls of other threads run at the same time."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.call: VisionCall | None = None
        self.input_ids: Tensor | None = None
        self.latest_ids: Tensor | None = None
        self.encoded = _Encoded()
        self.busy = False


class VisionWatch(Attached):
    """Remembers which images and videos a model encodes, while it is open, for each thread apart.

    Opened and removed in pairs; what was seen last can still be asked for afterwards.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self._seen = _Seen()
        self._open = 0
        self._undo = ExitStack()

    @property
    def input_ids(self) -> Tensor | None:
        """Tokens of the call whose images were encoded last, ``[batch, length]``."""
        return self._seen.input_ids

    @property
    def encoding(self) -> bool:
        """Whether images are being encoded in this thread; checkpointed layers run again in the backward pass."""
        return self._seen.busy

    def forget(self) -> None:
        """What this thread has encoded so far is of no further use."""
        self._seen.reset()

    def open(self) -> VisionWatch:
        self._open += 1
        if self._open == 1:
            self._seen = _Seen()
            module = self.adapter.multimodal
            for modality, name in METHODS.items():
                if hasattr(module, name):
                    replace_attribute(self._undo, module, name, self._wrapped(getattr(module, name), modality))
            for hook in (
                module.register_forward_pre_hook(self._see_tokens, with_kwargs=True),
                self.adapter.text_model.register_forward_pre_hook(self._decoder_reached),
            ):
                self._undo.callback(hook.remove)
        return self

    def remove(self) -> None:
        """Stop watching; the name is that of torch's handles."""
        self._open -= 1
        if not self._open:
            self._undo.close()

    def _wrapped(self, method: Callable[..., Any], modality: Modality) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @functools.wraps(method)  # generate() reads the signature
        def encode(*args: Any, **kwargs: Any) -> Any:
            seen = self._seen
            if seen.busy:  # Qwen3-VL encodes videos by its method for images
                return method(*args, **kwargs)
            if seen.encoded.read:
                seen.encoded = _Encoded()
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            seen.call = seen.encoded.calls[modality] = VisionCall(modality, arguments)
            seen.busy = True
            try:
                return method(*args, **kwargs)
            finally:
                seen.busy = False

        return encode

    def _see_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = args[0] if args else kwargs.get("input_ids")
        self._seen.latest_ids = self.adapter.placeholder_ids(input_ids, kwargs.get("inputs_embeds"))

    def _decoder_reached(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.read(self._seen.latest_ids)

    def read(self, input_ids: Tensor | None) -> None:
        """What was encoded since the last time is read with these tokens."""
        if not self._seen.encoded.read:
            self._seen.input_ids, self._seen.encoded.read = input_ids, True

    def current(self) -> VisionCall:
        """The call whose images the tower encodes right now, or encoded last; DopError if there is none."""
        call = self._seen.call
        if call is None:
            raise DopError("no image has been encoded while the vision tower was watched")
        return call

    def in_sequence_order(self, values: Mapping[Modality, Tensor]) -> Tensor:
        """Merge values of image tokens and of video tokens (``[tokens, …]``) in the order of the sequence."""
        if len(values) == 1:
            return next(iter(values.values()))
        assert self.input_ids is not None
        config = self.adapter.model.config
        images = self.input_ids == config.image_token_id
        num_images = len(values["image"])
        repeats = max(1, int(images.sum()) // max(1, num_images))  # beams repeat each sample
        is_image = images[::repeats][self.adapter.visual_token_mask(self.input_ids[::repeats])]
        merged = values["image"].new_empty(len(is_image), *values["image"].shape[1:])
        merged[is_image], merged[~is_image] = values["image"], values["video"]
        return merged

    def grids_of(self, num_visual: Sequence[int]) -> list[tuple[Grids, ...]] | None:
        """The grids of the images of each sample of a batch; ``None`` if other visual tokens were encoded."""
        pieces: list[Grids] = []
        numbers: dict[Modality, Tensor] = {}
        for modality, call in self._seen.encoded.calls.items():
            grids = self.adapter.token_grids(call)
            counts = torch.tensor([num_tokens(part) for part in grids])
            numbers[modality] = torch.repeat_interleave(torch.arange(len(grids)) + len(pieces), counts)
            pieces += grids
        if not pieces:
            return None
        of_token = self.in_sequence_order({m: n.to(self._device(n)) for m, n in numbers.items()}).cpu()
        if (parts := each_sample(num_visual, len(of_token))) is None:
            return None
        numbers_of = [torch.unique_consecutive(of_token[part]).tolist() for part in parts]
        result = [tuple(pieces[piece] for piece in dict.fromkeys(its)) for its in numbers_of]
        fits = all(sum(map(num_tokens, grids)) == count for grids, count in zip(result, num_visual, strict=True))
        return result if fits else None

    def _device(self, tensor: Tensor) -> torch.device:
        return tensor.device if self.input_ids is None else self.input_ids.device


def each_sample(num_visual: Sequence[int], available: int) -> list[slice] | None:
    """Where each sample's tokens are among the ``available`` ones; ``None`` if those are of other images.

    ``generate()`` encodes an image once for all of its beams, which stand next to each other.
    """
    wanted = sum(num_visual)
    if not available or wanted % available:
        return None
    repeats, start, result = wanted // available, 0, []
    for index, count in enumerate(num_visual):
        result.append(slice(start, start + count))
        start += count if (index + 1) % repeats == 0 else 0
    return result


def num_tokens(grids: Grids) -> int:
    """Visual tokens that stand in grids."""
    return sum(rows * columns for rows, columns in grids)


Read = Callable[[Any, tuple[Any, ...], dict[str, Any]], Tensor]
"""What a capture computes from the arguments of a module of the tower, or from its output as the only argument:
``[tiles or images, patches]``, or with a last axis of channels."""


class _Values(threading.local):
    """What was computed for the call that runs in this thread, by modality."""

    def __init__(self) -> None:
        self.values: dict[Modality, Tensor] = {}


class TowerCapture(Attached):
    """Computes something whenever a module of the vision tower runs, and hands it over by visual token.

    ``receive`` gets ``[visual tokens of the batch]``, or with a last axis of channels, when the decoder is about to
    read them. With ``of_output`` it is computed from what the module returns, otherwise from what it is given.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        module: nn.Module,
        read: Read,
        receive: Callable[[Tensor], None],
        of_output: bool = False,
    ) -> None:
        self.adapter, self.read, self.receive = adapter, read, receive
        self.watch = adapter.vision_watch.open()
        self._local = _Values()
        self._hooks = [
            module.register_forward_hook(self._tower_ran)
            if of_output
            else module.register_forward_pre_hook(self._tower_runs, with_kwargs=True),
            adapter.text_model.register_forward_pre_hook(self._decoder_reached),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.watch.remove()

    def forget(self) -> None:
        """What this thread has computed so far is of no further use."""
        self._local.values = {}

    @torch.no_grad()
    def _tower_runs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.watch.encoding:
            return
        values = self.read(module, args, kwargs)
        of_tokens = self.adapter.to_token_order(values if values.ndim == 3 else values[..., None])
        self._local.values[self.watch.current().modality] = of_tokens if values.ndim == 3 else of_tokens[:, 0]

    def _tower_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._tower_runs(module, (output,), {})

    def _decoder_reached(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.deliver()

    def deliver(self) -> None:
        """Hand over what was computed since the last time."""
        values, self._local.values = self._local.values, {}
        if values:
            self.receive(self.watch.in_sequence_order(values))

"""dop-search as a model of lmms-eval: any supported family, whole or under a strategy.

Unlike lmms-eval's own wrappers it never turns a crash into an empty answer: an error in one sample ends the run.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import simple_parse_args_string
from PIL import Image
from tqdm import tqdm

from dop_search.data.images import read_image
from dop_search.evaluation.lmms.answering import Generation, Part, Prompt, answer_prompts, part
from dop_search.evaluation.runnable import Runnable
from dop_search.models.loading import LoadedModel, load
from dop_search.strategy import Strategy
from dop_search.utils.errors import DataError, DopError
from dop_search.utils.registry import import_modules

DEFAULT_MAX_NEW_TOKENS = 128
"""For tasks that say nothing (TextVQA, VizWiz, OK-VQA)."""

_NO_OPTIONS = frozenset({"until", "max_new_tokens", "max_length", "image_aspect_ratio", "max_agentic_steps"})
_SAMPLING = frozenset({"temperature", "top_p", "top_k"})


class DopLmms(lmms):  # type: ignore[misc]
    """``lmms-eval --model dop --model_args pretrained=pocket,delta=strategy.json,batch_size=16``.

    Under ``accelerate launch`` or ``torchrun`` each process has the whole model, on its own GPU where there are some,
    and answers its share of the rows; lmms-eval gathers the results.

    Args:
        pretrained: as in :func:`dop_search.load`.
        strategy: a file by ``Strategy.save``, or what runs; nothing: the full model.
        delta: the same, by the name after which lmms-eval names the folder of its results.
        selector: another ranking of the visual tokens than the strategy's own.
        dtype, device, attn_implementation, revision, trust_remote_code: see :func:`dop_search.load`.
        batch_size: prompts per generation call; ``max_batch_size`` is accepted and not used.
        max_new_tokens: longest answer instead of what the task says.
        num_frames: frames taken of each video; nothing: the processor's own rule.
        imports: modules of your own that register selectors or model families; several are parted by ``:``.
        loaded: a model that is loaded already, instead of ``pretrained``.
        on_progress: called with (done, total) prompts; nothing: the first process shows a bar.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "pocket",
        strategy: str | Runnable | None = None,
        selector: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int | None = None,
        num_frames: int | None = None,
        attn_implementation: str = "sdpa",
        revision: str | None = None,
        trust_remote_code: bool = False,
        imports: str = "",
        delta: str | None = None,
        *,
        loaded: LoadedModel | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise DopError(f"`batch_size` must be a positive number, but got {batch_size!r}")
        self._rank = int(os.environ.get("RANK", "0"))  # as lmms-eval deals the rows out
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        import_modules([name for name in imports.split(":") if name])
        if strategy is not None and delta is not None:
            raise DopError(f"`strategy` and `delta` are the same, but got {strategy!r} and {delta!r}; give one of them")
        strategy = delta if strategy is None else strategy
        chosen = Strategy.load(strategy) if isinstance(strategy, str) else strategy
        if selector is not None:
            if not isinstance(chosen, Strategy):
                raise DopError(f"`selector={selector}` needs a strategy; the full model keeps every visual token")
            chosen = dataclasses.replace(chosen, selector=selector, selector_options={})
        self.strategy = chosen
        self.batch_size = int(batch_size)
        self.on_progress = on_progress
        self._max_new_tokens = max_new_tokens
        self._num_frames = num_frames
        self.loaded = loaded or load(
            str(pretrained),
            revision=revision,
            dtype=dtype,
            device=_own_device(device),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> DopLmms:
        """From ``--model_args``, which win over lmms-eval's own ``--batch_size`` and ``--device``."""
        given = simple_parse_args_string(arg_string)
        defaults = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**defaults, **given})

    @property
    def device(self) -> Any:
        """Where the model computes."""
        return self.loaded.adapter.device

    def clean(self) -> None:
        """Nothing: lmms-eval would delete the model after its first task list."""

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer per request, in order; see :func:`answer_prompts`."""
        hidden = self.on_progress is not None or self.rank > 0
        with tqdm(total=len(requests), desc="Model Responding", disable=hidden) as bar:
            return answer_prompts(
                self.loaded,
                [lambda request=request: self._prompt(request.args) for request in requests],  # type: ignore[misc]
                self.strategy,
                lengths=[(request.args[4], len(request.args[0])) for request in requests],
                batch_size=self.batch_size,
                num_frames=self._num_frames,
                on_progress=self.on_progress or (lambda done, total: bar.update(done - bar.n)),
            )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: none of the benchmarks here is scored by it."""
        raise NotImplementedError("the model `dop` answers by generation only; choose generate_until tasks")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("the model `dop` answers single rounds only; choose generate_until tasks")

    def _prompt(self, args: tuple[Any, ...]) -> Prompt:
        context, options, doc_to_visual, doc_id, task, split = args
        media = tuple(_media(item) for item in _flat(doc_to_visual(self.task_dict[task][split][doc_id])))
        return Prompt.of_user([*media, part("text", context)], self._generation(options))

    def _generation(self, options: Mapping[str, Any]) -> Generation:
        until = options.get("until") or ()
        given = {name: value for name, value in options.items() if name not in _NO_OPTIONS}
        sample = bool(given.get("do_sample", False)) and given.get("temperature", 1.0) > 0
        given = {name: value for name, value in given.items() if sample or name not in _SAMPLING}
        return Generation(
            int(self._max_new_tokens or options.get("max_new_tokens") or DEFAULT_MAX_NEW_TOKENS),
            (until,) if isinstance(until, str) else tuple(until),
            tuple(sorted({**given, "do_sample": sample}.items())),
        )


class DopChatLmms(DopLmms):
    """The same for tasks that say their messages themselves (interleaved images, system turns)."""

    is_simple = False

    def _prompt(self, args: tuple[Any, ...]) -> Prompt:
        _context, doc_to_messages, options, doc_id, task, split = args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).messages
        turns = [{"role": message.role, "content": list(map(_content, message.content))} for message in messages]
        return Prompt(turns, self._generation(options))


def _own_device(device: str | None) -> str:
    """One of several processes on a machine takes a GPU of its own where none is named."""
    if device in (None, "auto", "cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device or "auto"


def _content(content: Any) -> Part:
    if content.type == "text":
        return part("text", str(content.text))
    return _media(content.url, video=content.type == "video", kind=content.type)


def _media(item: Any, video: bool = False, kind: str = "image") -> Part:
    """An RGB image, or a video by its path."""
    if kind == "audio":
        raise DataError("the model `dop` takes text, images and videos, but the task gave audio")
    if isinstance(item, str) and (video or not item.lower().endswith((".png", ".jpg", ".jpeg", ".bmp", ".webp"))):
        return part("video", item)
    if isinstance(item, (str, Image.Image)):
        return part("image", read_image(item, "an image of the task"))
    if isinstance(item, dict) and isinstance(item.get("path") or item.get("url"), str):
        return part("video", item.get("path") or item["url"])
    if video and isinstance(item, (list, tuple)):
        return part("video", list(item))
    raise DataError(f"the model `dop` takes images and video paths, but the task gave {type(item).__name__}")


def _flat(visuals: Any) -> list[Any]:
    """A task gives nothing, a list, or a list of lists."""
    if visuals is None:
        return []
    if isinstance(visuals, (list, tuple)):
        return [leaf for item in visuals for leaf in _flat(item)]
    return [visuals]

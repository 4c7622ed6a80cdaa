"""The model's own methods that know what its decoder is not told: labels, and prompts that come in chunks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dop_search.pruning.packed import Tokens
from dop_search.pruning.prompt import Prompt, arrange
from dop_search.pruning.runtime import PrunedDecoder
from dop_search.utils.attached import Attached
from dop_search.utils.errors import DopError

IGNORED_LABEL = -100


class Entry(Attached):
    """A method of the model, with which its decoder is told more."""

    def __init__(self, decoder: PrunedDecoder, method: Callable[..., Any]) -> None:
        self.decoder, self.method = decoder, method
        functools.update_wrapper(self, method)  # type: ignore[arg-type]  # generate() reads the signature


class Forward(Entry):
    """The model's forward; notes which logits its loss will read."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same forward."""
        if kwargs.get("labels") is not None:
            self._see_labels(kwargs["labels"])
        return self.method(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _see_labels(self, labels: Tensor) -> None:
        self.decoder.call.read = torch.nn.functional.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1), value=False)


class Generate(Entry):
    """``generate()``, which encodes the images before the model sees the prompts that they belong to, and whose steps
    feed one real token each."""

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The same ``generate()``."""
        self.decoder.rankings.expect(kwargs.get("input_ids", inputs))
        call = self.decoder.call
        before = call.generating, call.checked
        call.generating, call.checked = kwargs.get("custom_generate") is None, None
        try:
            return self.method(inputs, *args, **kwargs)
        finally:
            call.generating, call.checked = before


class Prefill(Entry):
    """The prefill of ``generate()``: sees the whole prompt, also where the decoder gets it in chunks.

    A strategy is about whole prompts: which tokens are kept, and which one is last, a chunk does not tell.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same prefill."""
        given = inspect.signature(self.method).bind(*args, **kwargs).arguments
        call, arguments = self.decoder.call, given["model_kwargs"]
        by_embeds = arguments.get("inputs_embeds") is not None
        try:
            if given["generation_config"].prefill_chunk_size is not None:
                if by_embeds:
                    raise DopError("`prefill_chunk_size` cuts tokens, not `inputs_embeds`; leave it unset")
                call.prompt = self._whole_prompt(given["input_ids"], arguments, given["generation_config"])
            elif by_embeds:
                call.beside_embeds = given["input_ids"]
            return self.method(*args, **kwargs)
        finally:
            call.prompt = call.beside_embeds = None

    def _whole_prompt(self, input_ids: Tensor, arguments: Mapping[str, Any], config: Any) -> Prompt | None:
        """What the strategy says about the prompt; ``None`` for text, which may come in chunks as it likes."""
        decoder, adapter = self.decoder, self.decoder.adapter
        cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
        start = 0 if cache is None else cache.get_seq_length()
        total = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
        if total == input_ids.shape[1]:  # all tokens so far; otherwise the new ones
            input_ids = input_ids[:, start:]
        visual = adapter.visual_token_mask(input_ids)
        if not bool(visual.any()):
            return None
        if adapter.sees_images_whole:
            raise DopError(
                f"the tokens of an image see each other in {type(adapter.model).__name__}, which a prefill in chunks "
                "would cut; leave `prefill_chunk_size` unset"
            )
        if decoder.stages is not None:
            raise DopError(
                f"selector {decoder.strategy.selector!r} ranks whole prompts inside the decoder; leave "
                "`prefill_chunk_size` unset"
            )
        decoder.rankings.begin(arguments.get("mm_encoder_outputs"))
        decoder.rankings.read(input_ids)
        embeds = adapter.multimodal.get_input_embeddings()(input_ids)
        for modality, output in (arguments.get("mm_encoder_outputs") or {}).items():
            if output is not None:
                token = getattr(adapter.model.config, f"{modality}_token_id")
                features = torch.cat([part.flatten(0, -2) for part in output.pooler_output])
                embeds[input_ids == token] = features.to(embeds.device, embeds.dtype)
        valid = None if mask is None else mask[:, start:].bool()
        tokens = Tokens(embeds, input_ids, visual, valid=valid)
        return arrange(tokens, decoder.strategy, decoder.rankings, decoder.text, start)

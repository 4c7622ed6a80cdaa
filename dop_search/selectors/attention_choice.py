"""Which attention a method ranks by where the paper offers two: the CLS token's, or what a token receives."""

from __future__ import annotations

from torch import Tensor

from dop_search.selectors.base import SelectionSizes, SelectorInputs
from dop_search.utils.errors import DopError

ATTENTION_FIELDS = {"cls": "cls_attention", "received": "received_attention"}


def attention_field(attention: str) -> str:
    """The field of :class:`SelectorInputs` for a selector's option ``attention``.

    Raises:
        DopError: on an unknown value.
    """
    if attention not in ATTENTION_FIELDS:
        raise DopError(
            f"`attention` must be cls (the CLS token's row) or received (mean over all queries, for towers without "
            f"a CLS token), but got {attention!r}"
        )
    return ATTENTION_FIELDS[attention]


def attention_of(inputs: SelectorInputs, attention: str) -> Tensor:
    """``[n]`` the chosen attention."""
    return inputs.tensor(attention_field(attention))


def attention_flops(attention: str, sizes: SelectionSizes) -> int:
    """FLOPs of the chosen attention, queries and keys projected once more, from the layer's input.

    ``cls``: one row of scores and all keys; ``received``: all scores, queries and keys.
    """
    patches, width = sizes.num_patches, sizes.width
    if attention_field(attention) == "received_attention":
        return 2 * patches * width * (2 * width + patches)
    return 2 * patches * width * (width + 1)

"""What hangs on a model while it is in use, and must not travel with a copy of it."""

from __future__ import annotations

from typing import Any, NoReturn, SupportsIndex

from dop_search.utils.errors import DopError


class Attached:
    """Base of what is attached to one model instance: with it, the model cannot be copied or pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_copy()


def refuse_copy() -> NoReturn:
    """Raise :class:`DopError`."""
    raise DopError(
        "a pruned model cannot be copied or pickled, because the copy would still compute with parts of the original; "
        "leave `pruned(...)` or call `restore()` first, and prune the copy"
    )

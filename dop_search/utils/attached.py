"""What hangs on a model while it is in use, and must not travel with a copy of it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NoReturn, SupportsIndex

from dop_search.utils.errors import DopError


class Attached:
    """Base of what is attached to one model instance: with it, the model cannot be copied or pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_copy()


def replace_attribute(undo: ExitStack, owner: object, name: str, value: object) -> None:
    """Give an instance an attribute of its own until ``undo`` is closed; wrappers redirect ``setattr``."""
    own = vars(owner)
    undo.callback(own.__setitem__ if name in own else own.pop, name, own.get(name))
    own[name] = value


def refuse_copy() -> NoReturn:
    """Raise :class:`DopError`."""
    raise DopError(
        "a pruned model cannot be copied or pickled, because the copy would still compute with parts of the original; "
        "leave `pruned(...)` or call `restore()` first, and prune the copy"
    )

"""The sources of a name: the ``sources`` of ``conf/data/NAME.yaml``, for use without Hydra."""

from __future__ import annotations

from typing import Any

import yaml

from dop_search.data.sources import DatasetSource, ImageTable, Source, TaskSource
from dop_search.utils.conf import config_dir
from dop_search.utils.errors import DataError

_KINDS: dict[str, type[TaskSource | DatasetSource]] = {"task": TaskSource, "dataset": DatasetSource}


def named_sources(name: str) -> tuple[Source, ...] | None:
    """The sources of ``data=NAME``, or ``None`` if there is no such option or it has no sources.

    Raises:
        DataError: if the file lists something that is no source.
    """
    file = config_dir() / "data" / f"{name}.yaml"
    if not file.is_file():
        return None
    items = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("sources") or ()
    return tuple(parse_source(item, str(file)) for item in items) or None


def known_names() -> tuple[str, ...]:
    """The options with sources."""
    names = sorted(path.stem for path in (config_dir() / "data").glob("*.yaml"))
    return tuple(name for name in names if named_sources(name))


def parse_source(item: Any, where: str) -> Source:
    """A source from its mapping.

    Raises:
        DataError: saying what is unknown or missing.
    """
    kind = item.get("kind") if isinstance(item, dict) else None
    if kind not in _KINDS:
        raise DataError(f"{where}: a source needs `kind: task` or `kind: dataset`, but got {item!r}")
    fields = dict(item)
    try:
        if fields.get("images") is not None:
            fields["images"] = ImageTable(**fields["images"])
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise DataError(f"{where}: {error} in {item!r}") from error

"""What is found out about a study before a model is loaded: that it heeds its settings, has its samples, and which of
its settings its rows depend on."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dop_search.app.config import SearchConfig
from dop_search.app.config.section import Section
from dop_search.app.workbench import check_data, flops_ratios
from dop_search.data.validation import Split
from dop_search.selectors import make_selector
from dop_search.utils.errors import ConfigError

UNUSED = {
    "search": "the study's own searches are told by study.options",
    "eval": "what a study judges strategies by is part of it",
    "storage": "processes share the rows by study.folder: raise study.workers, or start the same command again",
}
"""Keys that only a search reads, and what studies have in their place."""

SPLITS: Mapping[str, tuple[Split, ...]] = {
    "additive_vs_exact": ("search", "heldout", "test"),
    "claims": (),
    "failures": ("search", "test"),
    "objective": ("search", "heldout", "test"),
}
"""The samples that a study reads; the others read search and held-out samples."""

JUDGED: Mapping[str, Split] = {
    "additive_vs_exact": "test",
    "compare": "heldout",
    "failures": "test",
    "long_answers": "heldout",
    "objective": "test",
    "text_operations": "heldout",
    "vision_tower": "heldout",
}
"""The samples whose answers a study compares with the annotation."""


ROWS: Mapping[str, frozenset[str]] = {
    "compare": frozenset({"methods"}),
    "selectors": frozenset({"names"}),
    "solver": frozenset({"seeds", "solvers"}),
    "split_attention": frozenset({"shares"}),
    "transfer": frozenset({"models", "seeds"}),
    "validation_seed": frozenset({"seeds"}),
    "validation_size": frozenset({"sizes"}),
}
"""Options that say which rows there are, and change none: with more of them a study goes on."""


def row_settings(config: SearchConfig, measure: Callable[..., Any]) -> dict[str, Any]:
    """The settings that a study's rows depend on: selector, space and options, the defaults of ``measure`` included."""
    study = config.study
    assert study is not None
    if study.name == "claims":
        return {}  # it reads other results, anew every time
    parameters = list(inspect.signature(measure).parameters.values())[2:]
    options = {parameter.name: parameter.default for parameter in parameters} | dict(study.options)
    own: dict[str, Any] = {}
    if study.name == "solver":  # its one budget is in no key
        own["budget"] = flops_ratios(config)
    if config.data.path is not None and Path(config.data.path).is_file():
        own["data_file"] = hashlib.sha256(Path(config.data.path).read_bytes()).hexdigest()[:16]
    return {
        **own,
        "selector": config.selector.model_dump(mode="json"),
        "space": config.space.model_dump(mode="json"),
        "options": {name: value for name, value in options.items() if name not in ROWS.get(study.name, ())},
    }


def check_settings(config: SearchConfig) -> None:
    """Refuse what a study would not heed, and what it cannot do.

    Raises:
        ConfigError: naming the key, or the budget, that a study would not heed.
        DopError: on an unknown selector, or samples that cannot be had.
    """
    assert config.study is not None
    name = config.study.name
    default = SearchConfig()
    for key, instead in UNUSED.items():
        given = _difference(key, getattr(config, key), getattr(default, key))
        if given is not None:
            raise ConfigError(f"study {name!r} has no use for `{key}`, but got {given}; leave it out: {instead}")
    flops_ratios(config)
    if name != "claims" and min(config.data.num_samples, config.data.num_heldout) < 2:
        raise ConfigError(
            f"study {name!r} gives intervals over samples, but got data.num_samples={config.data.num_samples} and "
            f"data.num_heldout={config.data.num_heldout}; give at least 2 of each"
        )
    if name in JUDGED and config.data.answers != "teacher":
        raise ConfigError(
            f"study {name!r} counts the answers that stay the full model's, but got "
            f"data.answers={config.data.answers}; leave it at teacher"
        )
    make_selector(config.selector.name, config.selector.options)
    judged = (JUDGED[name],) if name in JUDGED else ()
    check_data(config.data, config.eval, SPLITS.get(name, ("search", "heldout")), judged)


def _difference(key: str, given: Section | str | None, default: Section | str | None) -> str | None:
    """What differs from the default, as it is written on the command line; ``None``: nothing."""
    if given == default:
        return None
    if not isinstance(given, Section):
        return f"{key}={given}"
    values = given.model_dump(mode="json")
    usual = default.model_dump(mode="json") if isinstance(default, Section) else {}
    return next(f"{key}.{name}={value}" for name, value in values.items() if value != usual.get(name))

"""Which settings of ``dop-search`` a study has a use for: the others are refused, rather than read and left."""

from __future__ import annotations

from dop_search.config import SearchConfig
from dop_search.config.section import Section
from dop_search.errors import ConfigError

UNUSED = {
    "search": "the study's own searches are told by study.options",
    "eval": "what a study judges strategies by is part of it",
    "storage": "processes share the rows by study.folder: raise study.workers, or start the same command again",
}
"""Keys that only a search reads, and what studies have in their place."""


def check_settings(config: SearchConfig) -> None:
    """Refuse what a study would not heed.

    Raises:
        ConfigError: naming the key, or the budget.
    """
    assert config.study is not None
    default = SearchConfig()
    for key, instead in UNUSED.items():
        given = _difference(key, getattr(config, key), getattr(default, key))
        if given is not None:
            raise ConfigError(
                f"study {config.study.name!r} has no use for `{key}`, but got {given}; leave it out: {instead}"
            )
    flops_ratios(config)


def flops_ratios(config: SearchConfig) -> list[float]:
    """The budgets of a study.

    Raises:
        ConfigError: naming a budget that is none of FLOPs by ratio.
    """
    for budget in config.budget:
        if budget.name != "flops_ratio":
            raise ConfigError(
                f"studies compare at shares of the full model's FLOPs, but got the budget {budget.plain}; "
                "give ratios, as in budget=[0.3,0.15]"
            )
    return [budget.value for budget in config.budget]


def _difference(key: str, given: Section | str | None, default: Section | str | None) -> str | None:
    """What differs from the default, as it is written on the command line; ``None``: nothing."""
    if given == default:
        return None
    if not isinstance(given, Section):
        return f"{key}={given}"
    values = given.model_dump(mode="json")
    usual = default.model_dump(mode="json") if isinstance(default, Section) else {}
    return next(f"{key}.{name}={value}" for name, value in values.items() if value != usual.get(name))

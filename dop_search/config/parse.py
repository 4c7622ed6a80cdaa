"""From a composed Hydra configuration to :class:`SearchConfig`, with every error at once."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dop_search.config.schema import SearchConfig
from dop_search.errors import ConfigError

CONFIG_NAME = "config"
"""The primary config: ``conf/config.yaml``."""

_PACKAGE = Path(__file__).resolve().parents[1]


def config_dir() -> Path:
    """The folder with the Hydra groups: inside an installed package, or at the top of a checkout.

    Raises:
        ConfigError: if neither exists.
    """
    candidates = (_PACKAGE / "conf", _PACKAGE.parent / "conf")
    for path in candidates:
        if (path / f"{CONFIG_NAME}.yaml").is_file():
            return path
    places = " nor ".join(repr(str(path)) for path in candidates)
    raise ConfigError(f"no `{CONFIG_NAME}.yaml` in {places}; reinstall dop-search, or run it from a full checkout")


def parse_config(config: DictConfig) -> SearchConfig:
    """Validate a composed configuration.

    Raises:
        ConfigError: listing every error with its dotted path, the value that was given and near names.
    """
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {error}") from error
    try:
        return SearchConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_line(detail, tree) for detail in error.errors(include_url=False)]
        count = "an error" if len(lines) == 1 else f"{len(lines)} errors"
        raise ConfigError("\n  ".join([f"the configuration has {count}:", *lines])) from error


def _line(error: ErrorDetails, tree: Any) -> str:
    path, section = _walk(error["loc"])
    if path.startswith("budget[0]") and isinstance(tree, dict) and not isinstance(tree.get("budget"), list):
        path = path.replace("budget[0]", "budget", 1)
    given = error["input"]
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        fields = list(section.model_fields) if section else []
        advice = _suggest(str(error["loc"][-1]), fields) or f"; the keys are {', '.join(fields)}"
        return f"{path}: unknown key{advice}"
    if error["type"] == "literal_error":
        names = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"{path}: must be one of {', '.join(names)}, but got {given!r}{_suggest(str(given), names)}"
    if error["type"] == "union_tag_invalid":
        names = re.findall(r"'([^']*)'", str(context["expected_tags"]))
        key = str(context["discriminator"]).strip("'")
        tag = str(context["tag"])
        return f"{path}.{key}: must be one of {', '.join(names)}, but got {tag!r}{_suggest(tag, names)}"
    if error["type"] == "value_error":
        return f"{path}: {context['error']}"
    return f"{path}: {error['msg'][0].lower()}{error['msg'][1:]}, but got {given!r}"


def _suggest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _walk(location: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """The dotted path of an error (union tags left out), and the section whose key is wrong."""
    path = ""
    parent: type[BaseModel] | None = SearchConfig
    options: list[type[BaseModel]] = [SearchConfig]
    for element in location:
        if isinstance(element, int):
            path += f"[{element}]"
        elif len(options) > 1:  # the tag of a union: it chooses a section and is no part of the path
            options = [option for option in options if _tag(option) == element]
        else:
            path += f".{element}" if path else element
            parent = options[0] if options else None
            field = parent.model_fields.get(element) if parent else None
            options = _sections(field.annotation) if field else []
    return path, parent


def _tag(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("solver")
    return str(field.default) if field else None


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in _sections(argument)]

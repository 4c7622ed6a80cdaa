"""From a composed Hydra configuration to :class:`SearchConfig`, with every error at once."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from dop_search.app.config.schema import Imports, SearchConfig
from dop_search.app.config.solvers import OWN
from dop_search.utils.errors import ConfigError
from dop_search.utils.registry import did_you_mean, import_modules

Root = TypeVar("Root", bound=BaseModel)


def parse_config(config: DictConfig) -> SearchConfig:
    """A search's validated configuration; ConfigError listing every error with its path, what was given, near names."""
    return parse_as(config, SearchConfig)


def parse_as(config: DictConfig, schema: type[Root]) -> Root:
    """Validate a composed configuration of any command, see :func:`parse_config`; imports what ``imports`` names."""
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {error}") from error
    _import_first(tree)
    return parse_section(tree, schema)


def parse_section(values: Any, schema: type[Root], path: str = "") -> Root:
    """Validate a section that was found at ``path``, see :func:`parse_config`."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_line(detail, values, schema, path) for detail in error.errors(include_url=False)]
        count = "an error" if len(lines) == 1 else f"{len(lines)} errors"
        raise ConfigError("\n  ".join([f"the configuration has {count}:", *lines])) from error


def _import_first(tree: Any) -> None:
    """Import modules of one's own: what they register can be chosen, and has options."""
    try:
        names = TypeAdapter(Imports).validate_python(tree.get("imports", ()))
    except ValidationError:
        return  # told with all other errors
    import_modules(names)


def _line(error: ErrorDetails, tree: Any, schema: type[BaseModel], prefix: str) -> str:
    path, section = _walk(error["loc"], schema)
    path = ".".join(filter(None, (prefix, path)))
    if path.startswith("budget[0]") and isinstance(tree, dict) and not isinstance(tree.get("budget"), list):
        path = path.replace("budget[0]", "budget", 1)
    given = error["input"]
    context = error.get("ctx", {})
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        fields = list(_fields(section)) if section else []
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
    near = did_you_mean(name, names, count=2, cutoff=0.5)
    return f"; {near.rstrip()}" if near else ""


def _walk(location: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[str, type | None]:
    """The dotted path of an error (union tags left out), and the section whose key is wrong."""
    path = ""
    parent: type | None = schema
    options: list[type] = [schema]
    for element in location:
        if isinstance(element, int):
            path += f"[{element}]"
        elif len(options) > 1:  # the tag of a union: it chooses a section and is no part of the path
            options = [option for option in options if _tag(option) == element]
        else:
            path += f".{element}" if path else element
            parent = options[0] if options else None
            options = _sections(_fields(parent).get(element)) if parent else []
    return path, parent


def _tag(section: type) -> str | None:
    """What chooses this section among those of a union."""
    annotation = _fields(section).get("solver") or _fields(section).get("kind")
    names = typing.get_args(annotation)
    return str(names[0]) if names else OWN if annotation else None


def _fields(section: type) -> dict[str, Any]:
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    return {name: hint for name, hint in typing.get_type_hints(section).items() if not name.startswith("_")}


def _sections(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in _sections(argument)]

"""Write ``conf/README.md``: every configuration key, from the pydantic tree, and every option, from ``conf/``.

python -m dop_search.app.config.reference
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dop_search.app.config.schema import EvalRunConfig, SearchConfig
from dop_search.utils.conf import config_dir
from dop_search.utils.files import write_text_atomic

FILE = "README.md"

_INTRODUCTION = """\
# Configuration

Written by `python -m dop_search.app.config.reference` from `dop_search/app/config/` and the files here: change those.

A key is set on the command line (`dop-search data.num_samples=50 budget=0.3`), an option of a group is chosen by its
name (`dop-search model=llava_next_7b`). An option is a YAML file in the group's folder; `--config-dir MY_CONF` adds
folders of your own. `dop-search --cfg job` prints what a command line comes to; an unknown key or a wrong value is an
error before anything runs. [benchmarks.yaml](benchmarks.yaml) describes the benchmarks that suites name.
"""

_LAUNCHERS = {
    "basic": "Hydra's own: the runs of a sweep one after the other.",
    "joblib": "Several processes on this machine, hydra.launcher.n_jobs=N of them.",
}
"""Of ``hydra/launcher``: Hydra and its plugin bring these."""

_BY_NAME = ("Benchmark",)
"""What is chosen by name, and has its own file in ``conf/``."""

Schema = Mapping[str, Any]


def reference() -> str:
    """The text of ``conf/README.md``."""
    search, evaluation = SearchConfig.model_json_schema(), EvalRunConfig.model_json_schema()
    lines = [_INTRODUCTION, "## Options of the groups", "", *_groups(config_dir())]
    lines += ["## Keys of `dop-search`", "", *_section("", search, search["$defs"])]
    lines += ["## Options of the studies", "", *_studies()]
    lines += ["## Keys of `dop-eval`", "", *_table(evaluation, "see above")]
    return "\n".join(lines)


def _studies() -> Iterator[str]:
    """The question and the options of every study of the repository."""
    from dop_search.app.study import find_study, study_names  # not before it is needed: imports torch

    yield "`study.options` of each study in `experiments/`; its file in `conf/experiment/` sets all of them."
    yield ""
    for name in study_names():
        study = find_study(name)
        yield from (f"### `study.options` (study.name={name})", "", study.question, "")
        yield from _table(study.model_json_schema())


def _groups(folder: Path) -> Iterator[str]:
    """Every option of every group with the first sentence of its file; the default in bold."""
    defaults = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    chosen = {"hydra/launcher": "basic"}
    chosen |= {group: option for item in defaults if isinstance(item, dict) for group, option in item.items()}
    yield "In bold: what `dop-search` takes if nothing is chosen."
    for group in sorted({path.parent for path in folder.rglob("*.yaml")} - {folder}):
        name = group.relative_to(folder).as_posix()
        yield from ("", f"| `{name}` | |", "|---|---|")
        options = {path.stem: _first_sentence(path) for path in group.glob("*.yaml")}
        options |= _LAUNCHERS if name == "hydra/launcher" else {}
        for option in sorted(options):
            shown = f"**`{option}`**" if option == chosen.get(name) else f"`{option}`"
            yield f"| {shown} | {_cell(options[option])} |"
    yield ""


def _first_sentence(path: Path) -> str:
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    text = " ".join(line for line in comment if not line.startswith(("@package", "dop-search "))).strip()
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0]


def _section(path: str, schema: Schema, defs: Schema) -> Iterator[str]:
    if path:
        yield from (f"### `{path}`", "")
    if path and "description" in schema:
        yield from (_summary(schema), "")
    yield from _table(schema)
    for name, field in schema["properties"].items():
        mentioned = [defs[ref] for ref in _references(field) if ref not in _BY_NAME]
        inner = f"{path}.{name}" if path else name
        inner += "[]" if "items" in field else ""
        for section in mentioned:
            tag = [f"{key}={value['const']}" for key, value in section["properties"].items() if "const" in value]
            yield from _section(
                inner + (f" ({tag[0] if tag else 'any other'})" if len(mentioned) > 1 else ""), section, defs
            )


def _table(schema: Schema, section: str = "see below") -> Iterator[str]:
    yield from ("| key | type | default | |", "|---|---|---|---|")
    explained = _explained(schema.get("description", ""))
    for name, field in schema["properties"].items():
        made = {"object": "`{}`"}.get(str(field.get("type")), "")  # by a factory, which the schema does not show
        default = f"`{_plain(field['default'])}`" if "default" in field else made
        if name in schema.get("required", ()):
            default = "required"
        meaning = field.get("description") or explained.get(name, "")
        if _type(field) == "section":
            default, meaning = "", meaning or section
        elif "const" in field:
            meaning = "chooses this section"
        yield f"| `{name}` | {_type(field)} | {default} | {_cell(meaning)} |"
    yield ""


def _type(field: Schema) -> str:
    """The type in words, limits included."""
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum") or [field["const"]])
    if set(_references(field)) & set(_BY_NAME):
        return "list of (string or mapping)"
    if "$ref" in field or "oneOf" in field:
        return "section"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(part) for part in field["anyOf"]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        items = field.get("items", {})
        return f"list of {_type(items)}s" if items.keys() & {"type", "$ref", "oneOf"} else f"list of ({_type(items)})"
    name = {"object": "mapping", "boolean": "true, false", "null": "`null`"}.get(kind, kind)
    limits = {"exclusiveMinimum": ">", "minimum": "≥"}
    return " ".join([name, *(f"{sign} {field[limit]:g}" for limit, sign in limits.items() if limit in field)])


def _references(field: Any) -> list[str]:
    if isinstance(field, list):
        return [name for part in field for name in _references(part)]
    if not isinstance(field, dict):
        return []
    own = [str(field["$ref"]).rpartition("/")[2]] if "$ref" in field else []
    return own + [name for key in ("oneOf", "anyOf", "items") for name in _references(field.get(key))]


def _plain(value: Any) -> str:
    """A default as YAML would have it; what is null in a list of mappings is left out."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items() if item is not None) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _summary(schema: Schema) -> str:
    return _cell(schema["description"].partition("\n\n")[0])


def _explained(docstring: str) -> dict[str, str]:
    """Name → meaning, of the ``Attributes`` of a dataclass; several names may share a meaning."""
    block = docstring.partition("Attributes:\n")[2]
    items = re.findall(r"^    ([a-z_, ]+): (.*(?:\n     .*)*)", block, flags=re.MULTILINE)
    return {name: text for names, text in items for name in names.split(", ")}


def _cell(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def main() -> None:
    """Write the file."""
    write_text_atomic(config_dir() / FILE, reference())


if __name__ == "__main__":
    main()

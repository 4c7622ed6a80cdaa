"""The paper's claims beside what the records of this project say, and what it would take to check them for good.

Measures nothing: ``claims.yaml`` has the claims, and what to read from the results of other experiments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from rich.table import Table

from dop_search.app.config import SearchConfig
from dop_search.app.results import ResultFile, Row
from dop_search.app.study import Result, Study
from dop_search.app.workbench import Workbench
from dop_search.utils.errors import ConfigError

CLAIMS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))


class Claims(Study):
    """One row per claim, from the records below ``experiments``; they are written anew every time."""

    question = "What do the records of this project say to the paper's claims?"
    reads = ()

    experiments: str | None = None
    """The folder with the results of the other experiments; ``null``: that of this repository."""

    @property
    def folder(self) -> Path:
        """The same as a path."""
        return Path(__file__).parents[1] if self.experiments is None else Path(self.experiments)

    def settings(self, config: SearchConfig) -> dict[str, Any]:
        """Nothing: other results are read, anew every time."""
        return {}

    def keys(self, bench: Workbench) -> list[dict[str, Any]]:
        """See base class."""
        return [{"claim": claim["claim"]} for claim in CLAIMS]

    def row(self, bench: Workbench, claim: str) -> Row:
        """See base class."""
        return next(row for row in collect(self.folder) if row["claim"] == claim)

    def measure(self, bench: Workbench, results: ResultFile) -> None:
        """See base class."""
        for row in collect(self.folder):
            results.add({"claim": row["claim"]}, row)
        results.sort(self.keys(bench))

    @staticmethod
    def table(result: Result) -> Table:
        """Claims beside what was measured."""
        made = Table(title="The paper's claims", title_justify="left", show_lines=True)
        made.add_column("the paper")
        made.add_column("pocket model")
        made.add_column("SmolLM2, text alone")
        for row in result["rows"]:
            made.add_row(row["claimed"], row["measured"], row.get("decoder", "–"))
        return made


def collect(experiments: Path) -> list[Row]:
    """The rows of all claims.

    Raises:
        ConfigError: if a record is missing; names the command that makes it.
    """

    @cache
    def record(path: str) -> dict[str, Any]:
        try:
            return dict(json.loads((experiments / path).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            name = path.partition("/")[0]
            raise ConfigError(
                f"no {str(experiments / path)!r}; run `dop-search experiment={name} study.folder={experiments / name}` "
                "first"
            ) from error

    def rows(study: str, **fields: Any) -> list[dict[str, Any]]:
        its = record(f"{study}/result.json")["rows"]
        return [row for row in its if all(row.get(name) == value for name, value in fields.items())]

    def row(study: str, **fields: Any) -> dict[str, Any]:
        (found,) = rows(study, **fields)
        return found

    def leading() -> str:
        """Our search in the comparison: over selectors and spaces, where that was measured."""
        return "dop_search" if rows("compare", method="dop_search") else "dop_split"

    def decoder(study: str, **fields: Any) -> list[dict[str, Any]]:
        its = record(f"smollm2/{study}.json")["rows"]
        return [row for row in its if all(row.get(name) == value for name, value in fields.items())]

    environment = Environment(undefined=StrictUndefined)
    environment.globals.update(record=record, rows=rows, row=row, decoder=decoder, leading=leading)
    environment.tests["startswith"] = str.startswith

    def rendered(template: str) -> str:
        return environment.from_string(template).render()

    return [
        {**claim, "measured": rendered(claim["measured"]), "decoder": rendered(claim.get("decoder", "–"))}
        for claim in CLAIMS
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The table of ``experiments/claims/README.md``."""
    lines = ["| the paper | the pocket model | SmolLM2 | to check it | command |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        links = ", ".join(f"[{name}](../{name}/README.md)" for name in row["sources"])
        measured = f"{row['measured']} ({links})" if links else row["measured"]
        lines.append(
            f"| {row['claimed']} | {measured} | {row.get('decoder', '–')} | {row['needed']} | `{row['command']}` |"
        )
    return "\n".join(lines) + "\n"

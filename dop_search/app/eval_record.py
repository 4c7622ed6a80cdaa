"""The record of one evaluation, ``scores.json``: a full model and pruned versions of it on a suite. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from dop_search.app.record import (
    ModelInfo,
    Part,
    Provenance,
    Ratio,
    RelativeMean,
    ScoreComparison,
    Seconds,
    StrategyField,
    SuiteInfo,
)
from dop_search.utils.errors import CacheError
from dop_search.utils.files import write_text_atomic

SCORES_FILE = "scores.json"
SAMPLES_FOLDER = "samples"
FULL_FOLDER = "full"
FORMAT: Literal["dop_search.evaluation"] = "dop_search.evaluation"
VERSION: Literal[1] = 1


class StrategyScores(Part):
    """One strategy on the suite."""

    name: str
    """Unique in the record; also the folder of its per-sample outputs."""
    file: str
    strategy: StrategyField
    flops_ratio: Ratio | None = None
    """As the search that made the strategy measured it on its samples; ``None`` if the file doesn't say."""
    scores: dict[str, ScoreComparison]
    relative_mean: RelativeMean


class EvalRecord(Part):
    """One evaluation; per-sample outputs lie beside it, ``samples/<full or name>/<benchmark>.parquet``."""

    format: Literal["dop_search.evaluation"] = FORMAT
    version: Literal[1] = VERSION
    model: ModelInfo
    suite: SuiteInfo
    full: dict[str, float]
    """Benchmark → the full model's score."""
    units: dict[str, str]
    num_samples: dict[str, int]
    strategies: list[StrategyScores] = Field(default_factory=list)
    seconds: Seconds = 0.0
    provenance: Provenance | None = None

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, atomically."""
        data: dict[str, Any] = self.model_dump(mode="json")
        write_text_atomic(Path(path), json.dumps(data, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EvalRecord:
        """Read a record, from its file or from the directory that holds it.

        Raises:
            CacheError: if there is none, or it is malformed or of another version.
        """
        file = Path(path) / SCORES_FILE if Path(path).is_dir() else Path(path)
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"), strict=True)
        except FileNotFoundError as error:
            raise CacheError(f"no scores at {str(file)!r}; give the directory of a finished dop-eval") from error
        except (OSError, UnicodeDecodeError) as error:
            raise CacheError(f"cannot read the scores {str(file)!r}: {error}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise CacheError(f"{str(file)!r} is not a record of dop-eval: {where}: {first['msg']}") from error

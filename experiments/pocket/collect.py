"""Keep what a training run has to say: its curve in ``curves/NAME.jsonl``, its depth table in ``results.json``.

python experiments/pocket/collect.py RUN_DIR/deep deep
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dop_search.data.rendered import FAMILIES
from dop_search.utils.files import write_text_atomic

HERE = Path(__file__).parent


def _mean(accuracy: dict[str, float]) -> float:
    """Over the families that every variant is asked."""
    asked = [value for family, value in accuracy.items() if family in FAMILIES]
    return round(sum(asked) / len(asked), 4)


def main(run: Path, name: str) -> None:
    curve = (run / "curve.jsonl").read_text()
    final = json.loads((run / "final.json").read_text())
    training = json.loads((run / "training.json").read_text())
    last: dict[str, Any] = json.loads(curve.splitlines()[-1])
    out = HERE / "results.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    results.setdefault("training", {})[name] = {
        "metric": "every answer token right given the true ones before it, on the search split",
        "taps": training["taps"],
        "minutes": training["minutes"],
        "steps": training["steps"],
        "scenes": training["scenes"],
        "last_vision_loss": last["vision_loss"],
        "mean": _mean(final["accuracy"]),
        "families": {family: round(value, 4) for family, value in final["accuracy"].items()},
        "cut_from_mean": {layer: _mean(accuracy) for layer, accuracy in final["cut_from"].items()},
        "cut_from": {
            layer: {family: round(value, 3) for family, value in accuracy.items()}
            for layer, accuracy in final["cut_from"].items()
        },
    }
    write_text_atomic(out, json.dumps(results, indent=1) + "\n")
    write_text_atomic(HERE / "curves" / f"{name}.jsonl", curve)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""Copy trained weights into the package, with tokenizer, processor and configs written by this environment.

python experiments/pocket/package.py RUN_DIR/deep dop_search/models/pocket/deep
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from model import build_processor, build_tokenizer, export, load_weights


def main(source: Path, target: Path) -> None:
    tokenizer = build_tokenizer()
    model = load_weights(tokenizer, source / "model.safetensors")
    training = json.loads((source / "training.json").read_text())
    export(model, build_processor(tokenizer), target, training)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Draw ``curves.png`` (learning curves and depth profiles) from ``curves/`` and ``results.json``.

python experiments/pocket/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dop_search.utils.files import write_atomic

HERE = Path(__file__).parent
STYLES: dict[str, tuple[str, str, str]] = {
    "deep": ("taps after layers 6 and 9 (deep)", "black", "-"),
    "shallow": ("taps after layers 2 and 5 (shallow)", "0.45", "-"),
    "stretched": ("18 layers: deep, stretched", "tab:blue", "-"),
    "describing": ("deep, trained on to describe", "tab:orange", "-"),
    "deep_144_tokens": ("144 tokens: taps after 6 and 9", "black", ":"),
    "plain_144_tokens": ("144 tokens: no taps", "0.45", ":"),
}
MARKERS = {
    "deep": "o",
    "shallow": "s",
    "stretched": "D",
    "describing": "v",
    "deep_144_tokens": "^",
    "plain_144_tokens": "x",
}


def main() -> None:
    training = json.loads((HERE / "results.json").read_text())["training"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True, layout="constrained")
    for name, (label, color, line) in STYLES.items():
        records = [json.loads(record) for record in (HERE / "curves" / f"{name}.jsonl").read_text().splitlines()]
        look = {"color": color, "linestyle": line, "marker": MARKERS[name], "markersize": 4, "label": label}
        if name not in ("stretched", "describing"):  # on a CPU, from trained weights
            left.plot([record["seconds"] / 60 for record in records], [record["mean"] for record in records], **look)
        profile = training[name]["cut_from_mean"]
        layers = [*map(int, profile), len(profile)]
        right.plot(layers, [*profile.values(), training[name]["mean"]], **look)
    left.set(
        xlabel="minutes of training (two runs share one GPU)", ylabel="mean accuracy over 17 families", ylim=(0, 1)
    )
    right.set(xlabel="text stops reading the image from this layer on", xticks=range(0, 19, 2))
    right.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    write_atomic(HERE / "curves.png", lambda path: figure.savefig(path, dpi=110))


if __name__ == "__main__":
    main()

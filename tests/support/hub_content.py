"""What the local hub serves: checkpoints in the hub's layout, and data sets with the real names, splits and columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import yaml

from dop_search.data.benchmarks import benchmark_rows
from dop_search.evaluation.suites import load_suite
from dop_search.models.loading import load
from support.local_hub import LocalHub

NUM_SEARCH_ROWS = 48
NUM_BENCHMARK_ROWS = 8
"""At most, per benchmark."""


def add_checkpoint(hub: LocalHub, name: str, model: Any = None, processor: Any = None) -> Path:
    """A model under a hub id, in shards; by default the bundled one."""
    folder = hub.repository("models", name)
    if model is None:
        loaded = load("pocket")
        model, processor = loaded.model, loaded.processor
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3)
    processor.save_pretrained(folder)
    return folder


def add_benchmarks(hub: LocalHub, suite: str, num_rows: int) -> None:
    """The data sets of a suite: rendered rows in each benchmark's columns under its hub id, configuration and split."""
    for benchmark in load_suite(suite).benchmarks:
        rows = benchmark_rows(benchmark.name, num_rows)
        source = benchmark.dataset
        if benchmark.name == "gqa":
            add_gqa(hub, rows, "testdev", source.name or "")
        else:
            add_table(hub, source.path, source.name, source.split, rows)


def add_search_sources(hub: LocalHub) -> None:
    """The splits that ``data=mixed`` draws from; no row is one of :func:`add_benchmarks`."""

    def later(benchmark: str) -> list[dict[str, Any]]:
        return benchmark_rows(benchmark, NUM_BENCHMARK_ROWS + NUM_SEARCH_ROWS)[NUM_BENCHMARK_ROWS:]

    add_gqa(hub, later("gqa"), "val", "val_balanced_instructions")
    add_table(hub, "lmms-lab-encoder/textvqa", None, "train", later("textvqa"), "data/train-00000-of-00020.parquet")
    add_table(hub, "lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "validation", later("scienceqa"))
    charts = [
        {"image": row["image"], "query": row["question"], "label": [str(row["answer"])]} for row in later("chartqa")
    ]
    add_table(hub, "HuggingFaceM4/ChartQA", None, "train", charts)


def add_gqa(hub: LocalHub, rows: list[dict[str, Any]], split: str, questions: str) -> None:
    """Questions and images in configurations of their own, as GQA has them."""
    images = {row["imageId"]: row["image"] for row in rows}
    path, table = "lmms-lab-encoder/GQA", questions.replace("instructions", "images")
    add_table(hub, path, questions, split, [{k: v for k, v in row.items() if k != "image"} for row in rows])
    add_table(hub, path, table, split, [{"id": name, "image": image} for name, image in images.items()])


def add_table(
    hub: LocalHub, path: str, config: str | None, split: str, rows: list[dict[str, Any]], file: str | None = None
) -> None:
    """A split of a data set as Parquet, and its entry in the data set's card."""
    folder = hub.repository("datasets", path)
    name = file or f"{config or 'default'}/{split}-00000-of-00001.parquet"
    table = datasets.Dataset.from_list(rows)
    for column in ("image", "image_1"):
        if column in table.column_names:
            table = table.cast_column(column, datasets.Image())
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(folder / name))
    card = folder / "README.md"
    front = yaml.safe_load(card.read_text().split("---")[1]) if card.exists() else {"configs": []}
    entry = next((item for item in front["configs"] if item["config_name"] == (config or "default")), None)
    if entry is None:
        entry = {"config_name": config or "default", "data_files": []}
        front["configs"].append(entry)
    entry["data_files"].append({"split": split, "path": name})
    card.write_text(f"---\n{yaml.safe_dump(front)}---\n")

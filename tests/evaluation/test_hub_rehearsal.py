"""The whole line against a hub: download, pinned commits, caches, a run without network, and what a hub refuses.

The hub is a stub on the loopback address; what asks it is the real client code of transformers, datasets and lmms-eval.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.hub_content import add_benchmarks, add_checkpoint, add_search_sources
from support.local_hub import LocalHub, local_hub
from support.pictures import UNDRAWN, WITH_SUPPORT
from support.tiny_families import tiny_processor
from support.tiny_models import tiny_model

from dop_search.app.record import Record
from dop_search.app.scoring import EVALUATION_FOLDER
from dop_search.models.loading import load

pytestmark = pytest.mark.slow

CHECKPOINT = "llava-hf/llava-1.5-7b-hf"
SEARCH = (
    "model=llava_1_5_7b",
    "model.dtype=float32",
    "data=mixed",
    "data.num_samples=4",
    "data.num_heldout=4",
    "budget=0.3",
    "space.num_depth_levels=3",
    "space.num_token_levels=3",
    "search=additive",
    "search.num_rerank=2",
    "selector=cls_attention",
    "space=dop_split",
    "eval=dop13_static",
    "eval.limit=2",
    "tracking=none",
    UNDRAWN,
)
NOBODY = "http://127.0.0.1:9"
GATED = "meta/gated"
FAMILIES = {
    "llava_next": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "internvl": "OpenGVLab/InternVL3-8B-hf",
}
"""Of the papers' tables, beside LLaVA-1.5, with the real checkpoints' names."""
LOADS = """
import json, sys
import dop_search as dop
from dop_search.utils.errors import DopError
data = dop.validation_set("pocket", num_samples=2)
for name, revision, searched in json.loads(sys.argv[1]):
    try:
        loaded = dop.load(name, dtype="float32", revision=revision)
    except DopError as error:
        print(json.dumps({"error": str(error)}))
        continue
    found = {"fingerprint": loaded.weights_fingerprint, "family": loaded.model.config.model_type}
    if searched:
        profile = dop.profile(loaded, data, "received_attention", space="uniform", max_new_tokens=2)
        cost = profile.problem(dop.Budget(flops_ratio=1.0)).cost_model
        budget = dop.Budget(flops_ratio=(1 + cost.floor_ratio) / 2)  # half of what the text leaves
        found["ratios"] = cost.floor_ratio, cost.ratio(profile.solve(budget=budget)), budget.flops_ratio
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories of the hub."""
    root = tmp_path_factory.mktemp("hub")
    hub = LocalHub(root)
    add_checkpoint(hub, CHECKPOINT)
    (hub.repository("models", GATED) / "config.json").write_text("{}")
    for family, name in FAMILIES.items():
        add_checkpoint(hub, name, tiny_model(family), tiny_processor(family))
    add_benchmarks(hub, "dop13_static", 4)
    add_search_sources(hub)
    return root


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env={**WITH_SUPPORT, **environment}, check=False, capture_output=True, text=True
    )


def search(environment: dict[str, str], folder: Path, *overrides: str) -> Record:
    places = (f"hydra.run.dir={folder / 'run'}", f"cache_dir={folder / 'cache'}")
    done = run(environment, "-m", "dop_search.app.cli.search", *SEARCH, *places, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return Record.load(folder / "run" / "record.json")


@dataclass(frozen=True)
class Loads:
    """What loading one after the other in a new process gave, each of ``FAMILIES`` with a tiny search.

    Attributes:
        checkpoint: while a download breaks off, again, pinned, a commit that is not there, and a gated repository.
        families: of ``FAMILIES``, in order.
        asked: requests of the hub.
    """

    checkpoint: list[dict[str, Any]]
    families: list[dict[str, Any]]
    asked: list[str]


@pytest.fixture(scope="module")
def loads(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Loads:
    with local_hub(root) as hub:
        index = json.loads((root / "models" / CHECKPOINT / "model.safetensors.index.json").read_text())
        hub.truncate.add(sorted(set(index["weight_map"].values()))[1])
        hub.gated.add(GATED)
        asked = [(CHECKPOINT, None, False), (CHECKPOINT, None, False)]
        asked += [(CHECKPOINT, hub.commit("models", CHECKPOINT), False), (CHECKPOINT, "0" * 40, False)]
        asked += [(GATED, None, False), *((name, hub.commit("models", name), True) for name in FAMILIES.values())]
        done = run(hub.environment(tmp_path_factory.mktemp("home")), "-c", LOADS, json.dumps(asked))
        assert not hub.truncate
    assert done.returncode == 0, done.stdout + done.stderr  # an error that is no DopError
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return Loads(found[:5], found[5:], list(hub.asked))


def test_a_search_with_thirteen_benchmarks_and_the_same_again_without_network(root: Path, tmp_path: Path) -> None:
    """The second time benchmarks of each kind of data set are scored anew, from what was downloaded."""
    with local_hub(root) as hub:
        environment = hub.environment(tmp_path / "home")
        online = search(environment, tmp_path)
    assert online.results[0].scores is not None
    assert len(online.results[0].scores) == 13
    shutil.rmtree(tmp_path / "cache" / EVALUATION_FOLDER)
    few = "eval.benchmarks=[gqa,mme,scienceqa]"
    offline = search({**environment, "HF_ENDPOINT": NOBODY}, tmp_path, few)
    assert offline.results[0].strategy.key() == online.results[0].strategy.key()
    assert offline.results[0].kl_heldout == pytest.approx(online.results[0].kl_heldout, rel=1e-5)
    assert offline.results[0].scores is not None
    assert list(offline.results[0].scores) == ["gqa", "mme", "scienceqa"]
    for name, score in offline.results[0].scores.items():
        assert score == online.results[0].scores[name]


def test_what_a_hub_may_answer(root: Path, loads: Loads) -> None:
    """A download that breaks off leaves nothing wrong; a pinned commit, one that is not there, a gated repository."""
    first, again, pinned, missing, gated = loads.checkpoint
    whole = load(str(root / "models" / CHECKPOINT), dtype="float32").weights_fingerprint
    assert first.get("fingerprint") in (whole, None)
    assert again["fingerprint"] == pinned["fingerprint"] == whole
    assert "0" * 40 in missing["error"]
    assert "gated" in gated["error"].lower() or "restricted" in gated["error"].lower()


def test_every_family_of_the_papers_tables_comes_from_a_hub(root: Path, loads: Loads) -> None:
    """Shards, processor and pinned commit of tiny models under the names of the real ones, and a search on each."""
    assert len(loads.families) == len(FAMILIES)
    for (family, name), item in zip(FAMILIES.items(), loads.families, strict=True):
        assert item.get("family") == family, item
        assert item["fingerprint"] == load(str(root / "models" / name), dtype="float32").weights_fingerprint
        floor, ratio, limit = item["ratios"]
        assert floor < ratio <= limit < 1.0
    shards = [line for line in loads.asked if line.startswith("GET") and ".safetensors" in line]
    assert sum(any(name in line for name in FAMILIES.values()) for line in shards) >= 3 * len(FAMILIES)

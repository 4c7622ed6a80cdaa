"""The whole line against a hub: download, pinned commits, caches, a run without network, and what a hub refuses.

The hub is a stub on the loopback address; what asks it is the real client code of transformers, datasets and lmms-eval.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_content import add_benchmarks, add_checkpoint, add_search_sources
from support.local_hub import LocalHub, local_hub

from dop_search.app.record import Record

pytestmark = pytest.mark.slow

CHECKPOINT = "llava-hf/llava-1.5-7b-hf"
SEARCH = (
    "model=llava_1_5_7b",
    "model.dtype=float32",
    "data=mixed",
    "data.num_samples=8",
    "data.num_heldout=8",
    "budget=0.3",
    "space.num_depth_levels=3",
    "space.num_token_levels=3",
    "search.num_rerank=2",
    "eval=dop13_static",
    "eval.limit=2",
    "tracking=none",
)
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories of the hub."""
    root = tmp_path_factory.mktemp("hub")
    hub = LocalHub(root)
    add_checkpoint(hub, CHECKPOINT)
    add_benchmarks(hub, "dop13_static", 4)
    add_search_sources(hub)
    return root


@pytest.fixture
def hub(root: Path) -> Iterator[LocalHub]:
    with local_hub(root) as hub:
        yield hub


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, check=False, capture_output=True, text=True
    )


def search(environment: dict[str, str], folder: Path, *overrides: str) -> Record:
    places = (f"hydra.run.dir={folder}", f"cache_dir={folder / 'cache'}")
    done = run(environment, "-m", "dop_search.app.cli.search", *SEARCH, *places, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return Record.load(folder / "record.json")


def load_checkpoint(environment: dict[str, str], revision: str | None = None) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys, dop_search as dop\n"
        f"try: print(dop.load({CHECKPOINT!r}, dtype='float32', revision={revision!r}).weights_fingerprint)\n"
        "except dop.utils.errors.DopError as error: sys.exit(str(error))"
    )
    return run(environment, "-c", "import dop_search.utils.errors\n" + code)


def test_a_search_with_thirteen_benchmarks_and_the_same_again_without_network(root: Path, tmp_path: Path) -> None:
    with local_hub(root) as hub:
        environment = hub.environment(tmp_path / "home")
        online = search(environment, tmp_path / "online")
    assert online.results[0].scores is not None
    assert len(online.results[0].scores) == 13
    offline = search({**environment, "HF_ENDPOINT": NOBODY}, tmp_path / "offline")
    assert offline.results[0].strategy.key() == online.results[0].strategy.key()
    assert offline.results[0].scores == online.results[0].scores
    assert offline.results[0].kl_heldout == pytest.approx(online.results[0].kl_heldout, rel=1e-5)


def test_a_commit_that_the_hub_does_not_have_is_named(hub: LocalHub, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path)
    pinned = load_checkpoint(environment, hub.commit("models", CHECKPOINT))
    assert pinned.returncode == 0
    missing = load_checkpoint(environment, "0" * 40)
    assert missing.returncode == 1
    assert "0" * 40 in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_gated_repository_is_a_sentence(hub: LocalHub, tmp_path: Path) -> None:
    hub.gated.add(CHECKPOINT)
    done = load_checkpoint(hub.environment(tmp_path))
    assert done.returncode == 1
    assert "gated" in done.stderr.lower() or "restricted" in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_a_download_that_breaks_off_leaves_nothing_wrong(hub: LocalHub, tmp_path: Path) -> None:
    index = json.loads((hub.root / "models" / CHECKPOINT / "model.safetensors.index.json").read_text())
    hub.truncate.add(sorted(set(index["weight_map"].values()))[1])
    environment = hub.environment(tmp_path / "home")
    first = load_checkpoint(environment)
    again = load_checkpoint(environment)
    assert again.returncode == 0
    assert first.returncode == 0 or "Traceback" not in first.stderr
    whole = load_checkpoint(hub.environment(tmp_path / "other"))
    assert again.stdout.split()[-1] == whole.stdout.split()[-1]
    assert not hub.truncate

"""The distributions, and real environments made from the wheel: with no extra, ``[search]``, ``[search,eval]``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dop_search import Strategy, __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
UNREACHABLE = ("dns error", "error sending request", "network was disabled", "timed out")
COMMANDS = tuple(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
SMALL = (
    *("experiment=smoke", "eval=none", "data.num_samples=2", "data.num_heldout=2", "data.num_test=0", "num_threads=1"),
    *("space.num_depth_levels=2", "space.num_token_levels=2", "search.num_rerank=1", "hydra.run.dir=run"),
)
WITHOUT_PICTURES = """
import matplotlib.figure

def touch(figure, target, **options):
    target.touch() if hasattr(target, "touch") else target.write(b"")

matplotlib.figure.Figure.savefig = touch
"""
GROWTH = ("", "[testing]", "[search]", "[search,eval]")
PRUNED = """
import json, sys
from PIL import Image
import dop_search as dop
loaded = dop.load("pocket")
prompt = "USER: <image>\\nWhat is this? ASSISTANT:"
inputs = loaded.processor(images=[Image.new("RGB", (336, 336), "red")], text=prompt, return_tensors="pt")
with dop.pruned(loaded.model, dop.Strategy.load("strategy.json")):
    out = loaded.model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
cached = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
imported = {"hydra", "optuna", "mlflow", "lmms_eval"} & set(sys.modules)
answer = [out.sequences.tolist(), cached, sorted(imported)]
"""
WITHOUT_EXTRAS = f"""{PRUNED}
for arguments in ({{"model": "pocket/shallow"}}, {{"model": "pocket", "device_map": "auto"}}):
    try:
        dop.load(arguments.pop("model"), **arguments)
    except dop.DopError as error:
        answer.append(f"{{type(error).__name__}}: {{error}}")
print(json.dumps(answer))
"""
CONFORMANCE = """
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessor, LlavaProcessor
from dop_search.testing.conformance import PruningConformance
from dop_search.testing.models import randomize_
from dop_search.testing.sizes import IMAGE_TOKEN_ID, TinySizes
from dop_search.testing.tokenizer import VICUNA, square, tiny_tokenizer

class TestMine(PruningConformance):
    def make_model(self, attn_implementation):
        tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = AutoConfig.for_model(
            "llava",
            text_config={"model_type": "llama", **TinySizes().text()},
            vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7, **tower},
            image_token_index=IMAGE_TOKEN_ID,
        )
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attn_implementation)
        randomize_(model, seed=0)
        model.generation_config.suppress_tokens = [IMAGE_TOKEN_ID]
        return model.eval()

    def make_processor(self):
        return LlavaProcessor(
            image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square(28)),
            tokenizer=tiny_tokenizer("<image>"),
            patch_size=7,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=VICUNA,
        )
"""


def uv(*arguments: str | Path, cwd: Path) -> None:
    """Run uv; skips where there is none or where it reaches no package index."""
    program = os.environ.get("UV") or shutil.which("uv")
    if program is None:
        pytest.skip("uv is not installed: no environment can be made")
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode and any(text in done.stderr for text in UNREACHABLE):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def link_compiled(folder: Path) -> None:
    """Bring what this environment has compiled of the same files; Python takes it where size and time agree."""
    here, there = (Path(sysconfig.get_path("purelib", vars={"base": base})) for base in (sys.prefix, str(folder)))
    for path in here.rglob(f"__pycache__/*.{sys.implementation.cache_tag}.pyc"):
        target = there / path.relative_to(here)
        if target.parent.parent.is_dir() and not target.exists():
            target.parent.mkdir(exist_ok=True)
            with suppress(OSError):  # another disk, without links to this one
                target.hardlink_to(path)


@dataclass
class Environment:
    """An environment, and a folder to run its commands in."""

    bin: Path
    work: Path

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, with nothing of this one."""
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        line = [str(self.bin / command), *arguments]
        return subprocess.run(line, cwd=self.work, env=clean, capture_output=True, text=True, check=False)

    def refusal(self, command: str, *arguments: str) -> str:
        """The one line that a command ends with before it does anything; after Hydra's own line about the job."""
        done = self.run(command, *arguments)
        lines = [line for line in done.stderr.splitlines() if line and "HYDRA_FULL_ERROR" not in line]
        lines = [line for line in lines if not line.startswith("Error executing job")]
        assert (done.returncode, done.stdout, len(lines)) == (1, "", 1), done.stdout + done.stderr
        return lines[0]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files as they are now, in a repository of their own, with untracked ones beside them."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: nothing says which files are tracked")
    folder = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    for name in ("run.log", "dop_search/notes.txt", "experiments/main/run.log", "conf/mine.yaml"):
        (folder / name).write_text("untracked")
    return folder


@pytest.fixture(scope="module")
def distributions(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--out-dir", folder, cwd=tree)
    return folder


@pytest.fixture(scope="module")
def environment(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    """The environment with some extras: one that grows, as making and compiling packages costs most of the time.

    The tests stand in the order of ``GROWTH``.
    """
    (wheel,) = distributions.glob("*.whl")
    folder = tmp_path_factory.mktemp("environment")
    made: list[str] = []

    def make(extras: str) -> Environment:
        if not made:
            uv("venv", "--quiet", "--python", sys.executable, "venv", cwd=folder)
        if extras not in made:
            assert all(GROWTH.index(other) < GROWTH.index(extras) for other in made)
            pins = ROOT / ".ci" / "constraints.txt"
            named = f"dop-search{extras} @ {wheel.as_uri()}"
            uv("pip", "install", "--quiet", "--python", "venv", "--constraints", pins, named, cwd=folder)
            link_compiled(folder / "venv")
            made.append(extras)
        assert made[-1] == extras
        return Environment(folder / "venv" / ("Scripts" if os.name == "nt" else "bin"), folder)

    return make


def test_the_source_distribution_holds_what_is_tracked(tree: Path, distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        found = sorted(name.partition("/")[2] for name in file.getnames())
    tracked = subprocess.run(["git", "ls-files"], cwd=tree, capture_output=True, text=True, check=True).stdout
    assert found == sorted(["PKG-INFO", *tracked.splitlines()])


def test_the_wheel_holds_the_package_with_one_model(tree: Path, distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    assert wheel.stat().st_size <= 15e6
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=tree, capture_output=True, text=True, check=True).stdout
    others = tuple(f"dop_search/models/pocket/{name}/" for name in ("describing", "shallow", "stretched"))
    others += ("dop_search/models/smol_llava/weights.safetensors",)
    package = {name for name in tracked.splitlines() if name.startswith("dop_search/") and not name.startswith(others)}
    configuration = {f"dop_search/{name}" for name in tracked.splitlines() if name.startswith("conf/")}
    assert found == package | configuration


def check_versions(environment: Environment) -> None:
    for command in COMMANDS:
        assert environment.run(command, "--version").stdout == f"{command} {__version__}\n"
    assert environment.run("python", "-m", "dop_search", "--version").stdout == f"dop-search {__version__}\n"


def test_without_extras_every_command_says_our_version(environment: Callable[[str], Environment]) -> None:
    check_versions(environment(""))


@pytest.mark.parametrize(
    ("command", "what", "extras"),
    [
        ("dop-search", "dop-search", "search"),
        ("dop-search experiment=smoke", "dop-search", "search"),
        ("python -m dop_search", "dop-search", "search"),
        ("dop-eval", "dop-eval", "search,eval"),
        ("dop-report outputs", "dop-report", "search"),
        ("dop-track outputs", "dop-track", "search"),
        ("dop-bench --mlflow sqlite:///mlflow.db", "dop-bench: --mlflow", "search"),
    ],
)
def test_without_extras_a_command_names_the_one_it_needs(
    environment: Callable[[str], Environment], command: str, what: str, extras: str
) -> None:
    refusal = environment("").refusal(*command.split())
    assert refusal.startswith(f"{what} needs `dop-search[")
    assert f"pip install 'dop-search[{extras}]'" in refusal


def test_without_extras_a_model_runs_pruned_as_it_does_here(
    environment: Callable[[str], Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a model lacks is said."""
    base = environment("")
    Strategy.depthwise(12, q=4, kv=6, mlp=3, num_visual_tokens=20).save(base.work / "strategy.json")
    done = base.run("python", "-c", WITHOUT_EXTRAS)
    assert done.returncode == 0, done.stderr
    sequences, cached, imported, absent, spread = json.loads(done.stdout)
    monkeypatch.chdir(base.work)
    here: dict[str, Any] = {}
    exec(PRUNED, here)
    assert [sequences, cached] == here["answer"][:2]
    assert len(set(cached)) > 1, cached
    assert not imported
    assert absent.startswith("DopError: the pocket model 'shallow' is not in")
    assert "a clone of the repository has all" in absent
    assert spread.startswith("MissingExtraError: `device_map` needs accelerate")


def test_the_test_kit_comes_with_its_extra(environment: Callable[[str], Environment]) -> None:
    """All of it can be imported, and some of the conformance suite runs on a model."""
    kit = environment("[testing]")
    modules = sorted(path.stem for path in (ROOT / "dop_search" / "testing").glob("*.py") if path.stem != "__init__")
    imports = "".join(f"import dop_search.testing.{name}\n" for name in modules)
    (kit.work / "test_mine.py").write_text(imports + CONFORMANCE)
    done = kit.run("python", "-m", "pytest", "-q", "-k", "restored or full_model", "test_mine.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_with_search_every_command_says_our_version(environment: Callable[[str], Environment]) -> None:
    check_versions(environment("[search]"))


def test_with_search_the_main_job_runs_and_is_drawn(environment: Callable[[str], Environment]) -> None:
    search = environment("[search]")
    (search.work / "without_pictures.py").write_text(WITHOUT_PICTURES)
    done = search.run("python", "-m", "dop_search", *SMALL, "imports=[without_pictures]")
    assert done.returncode == 0, done.stderr
    assert json.loads((search.work / "run" / "record.json").read_text())["results"]
    picture = search.work / "run" / "plots" / "layer_map.png"
    assert picture.stat().st_size == 0
    assert search.run("dop-report", "run").returncode == 0
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("command", "what", "extras"),
    [
        ("dop-search eval=pocket13", "dop-search: eval=pocket13", "eval"),
        ("dop-eval", "dop-eval", "search,eval"),
        ("dop-search -m hydra/launcher=slurm", "dop-search: hydra/launcher=slurm", "slurm"),
        ("dop-search -m hydra/launcher=ray_gpu", "dop-search: hydra/launcher=ray_gpu", "ray"),
        ("dop-search storage=postgresql+psycopg://u@h/d", "dop-search: the storage", "postgres"),
    ],
)
def test_with_search_another_extra_is_named_before_the_model_is_loaded(
    environment: Callable[[str], Environment], command: str, what: str, extras: str
) -> None:
    refusal = environment("[search]").refusal(*command.split())
    assert refusal.startswith(what)
    assert f"pip install 'dop-search[{extras}]'" in refusal


def test_with_eval_a_benchmark_is_scored(environment: Callable[[str], Environment]) -> None:
    scored = ("eval.benchmarks=[gqa]", "eval.limit=2", "num_threads=1", "hydra.run.dir=scored", "tracking=none")
    done = environment("[search,eval]").run("dop-eval", *scored)
    assert done.returncode == 0, done.stderr
    scores = json.loads((environment("[search,eval]").work / "scored" / "scores.json").read_text())
    assert scores["num_samples"] == {"gqa": 2}

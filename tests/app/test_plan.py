"""A plan knows what a search takes before anything is loaded, for the published models at their real sizes."""

from __future__ import annotations

import re

import pytest
import torch
from hydra import compose, initialize_config_dir

from dop_search.app.config import SearchConfig, parse_config
from dop_search.app.plan import Plan, make_plan, show_plan
from dop_search.app.plan.plan import least_bytes
from dop_search.data.validation import validation_set
from dop_search.divergence import DivergenceEngine, make_teacher
from dop_search.divergence.memory import GIB, limit_bytes, weight_bytes
from dop_search.divergence.profiling import profile
from dop_search.divergence.teacher import generate_ids
from dop_search.models.loading import load
from dop_search.models.published import published_models
from dop_search.models.quantization import meta_model
from dop_search.search import CurveGrid
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.testing.peak_memory import peak_memory
from dop_search.utils.conf import config_dir
from dop_search.utils.errors import DopError, MemoryLimitError

PARAMETERS = {
    "llava_1_5_7b": ("llava-hf/llava-1.5-7b-hf", 7_063_427_072),
    "llava_1_5_13b": ("llava-hf/llava-1.5-13b-hf", None),
    "llava_next_7b": ("llava-hf/llava-v1.6-vicuna-7b-hf", None),
    "llava_next_13b": ("llava-hf/llava-v1.6-vicuna-13b-hf", None),
    "llava_onevision_7b": ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 8_030_348_832),
    "qwen2_vl_7b": ("Qwen/Qwen2-VL-7B-Instruct", 8_291_375_616),
    "qwen2_5_vl_7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    "qwen3_vl_8b": ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
    "internvl3_8b": ("OpenGVLab/InternVL3-8B-hf", 7_944_373_760),
}
"""Configuration, hub id, and the number of parameters that the hub shows (where it is known to the last)."""


def configured(*overrides: str) -> SearchConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return parse_config(compose("config", overrides=list(overrides)))


def planned(model: str, memory: int, *overrides: str) -> Plan:
    sizes = ("data=gqa", "data.num_samples=100", "data.num_heldout=100", "model.device=cuda")
    return make_plan(configured(f"model={model}", f"memory={memory}", *sizes, *overrides))


def test_every_configured_model_is_known() -> None:
    """The nine whose sizes the plan brings along; of any other it reads the configuration, from the hub or a folder."""
    assert {path.stem for path in (config_dir() / "model").glob("*.yaml")} > set(PARAMETERS)
    for name, (hub_id, _) in PARAMETERS.items():
        assert configured(f"model={name}").model.name_or_path == hub_id


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_add_up_to_the_published_number_of_parameters(name: str) -> None:
    hub_id, known = PARAMETERS[name]
    model = meta_model(published_models()[hub_id].config)
    total = sum(parameter.numel() for parameter in model.parameters())
    if known is not None:
        assert total == known
    else:
        assert round(total / 1e9, 2) == {"7b": 7.06, "13b": 13.35}[name.rsplit("_", 1)[1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_100_samples_fit_24_and_80_gib(name: str) -> None:
    """On 24 GiB a 13B model needs its weights in fewer bits, the others do not."""
    quantised = ("model.quantization=int8",) if name.endswith("13b") else ()
    for memory, extra in ((24, quantised), (80, ())):
        plan = planned(name, memory, *extra)
        assert plan.is_feasible
        assert plan.needed_bytes <= plan.peak_bytes <= limit_bytes(memory, "cuda")
        assert [stage.name.split(":")[0] for stage in plan.stages] == [
            "load", "full model's answers", "curves", "GSOP's trajectories", "candidates", "held-out samples",
            "accuracy",
        ]  # fmt: skip
        assert all(stage.flops > 0 and stage.num_layer_forwards > 0 for stage in plan.stages[1:])


@pytest.mark.slow
def test_more_memory_never_computes_more() -> None:
    plans = [planned("llava_next_7b", memory) for memory in (20, 24, 48, 80, 140)]
    work = [sum(stage.num_layer_forwards for stage in plan.stages) for plan in plans]
    assert work == sorted(work, reverse=True)
    assert work[0] > 1.5 * work[-1]
    assert all(plan.peak_bytes > 0.6 * plan.limit_bytes for plan in plans[:3]), "and what is there is used"


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("model=llava_next_13b", "memory=24", "data=gqa")
    with pytest.raises(MemoryLimitError, match="does not fit") as caught:
        show_plan(configured(*arguments, "model.device=cuda"))
    message = str(caught.value)
    for option in re.findall(r"(model\.\w+=\w+|memory=[\d.]+)", message):
        device = "auto" if "device_map" in option else "cuda"
        assert make_plan(configured(*arguments, f"model.device={device}", option)).is_feasible
    assert {"model.quantization=int8", "model.quantization=bnb4", "model.device_map=auto"} <= set(
        re.findall(r"model\.\w+=\w+", message)
    )
    enough = re.search(r"memory=([\d.]+)", message)
    assert enough is not None
    assert not make_plan(configured(*arguments, "model.device=cuda", f"memory={float(enough[1]) - 0.5}")).is_feasible
    assert "24.9" in capsys.readouterr().out  # GiB of weights


@pytest.mark.slow
def test_a_run_takes_what_the_plan_of_a_cpu_suggests() -> None:
    """Each suggestion is feasible when it is planned, and the search itself takes the memory that would do."""
    sizes = ("data.num_samples=6", "data.num_heldout=20", "data.num_test=0", "data.max_new_tokens=2")
    arguments = ("model=pocket", "model.device=cpu", "model.dtype=float32", *sizes)
    with pytest.raises(MemoryLimitError, match="does not fit") as caught:
        show_plan(configured(*arguments, "memory=0.02"))
    options = re.findall(r"(model\.\w+=\w+|memory=[\d.]+)", str(caught.value))
    assert options
    for option in options:
        assert make_plan(
            configured(*arguments, *(["memory=0.02"] if option.startswith("model") else []), option)
        ).is_feasible
    memory = float(options[0].removeprefix("memory="))
    loaded, selector = load("pocket", dtype="float32", device="cpu"), make_selector("cls_attention")
    drawn = [
        validation_set("pocket", num_samples=count, split=split) for split, count in (("search", 6), ("heldout", 20))
    ]
    teachers = [make_teacher(loaded, data, selector, max_new_tokens=2, memory=memory) for data in drawn]
    for teacher in teachers:
        DivergenceEngine(loaded.adapter, teacher, memory=memory).evaluate([Strategy.depthwise(12, 3, 4, 2)])


def test_a_device_that_is_not_here_needs_its_memory_said() -> None:
    with pytest.raises(DopError, match="set memory to its GiB, as in memory=24"):
        make_plan(configured("model=llava_1_5_7b", "model.device=cuda:1"))


@pytest.mark.parametrize("name", ["device", "device_map"])
def test_a_place_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(DopError, match=f"`{name}` must be .* but got 'foo'"):
        make_plan(configured(f"model.{name}=foo"))


def test_every_map_of_accelerate_is_several_gpus() -> None:
    plan = make_plan(configured("model=llava_1_5_7b", "model.device_map=balanced", "memory=80"))
    assert (plan.device.type, plan.num_devices) == ("cuda", max(2, torch.cuda.device_count()))


def test_options_that_the_selector_has_not_are_refused() -> None:
    with pytest.raises(DopError, match="windows"):
        make_plan(configured("selector=vscan", "+selector.options.windows=3"))


def test_an_unknown_checkpoint_is_named() -> None:
    with pytest.raises(DopError, match=r"'me/mine' are not known.*local copy.*llava-hf/llava-1.5-7b-hf"):
        make_plan(configured("model.name_or_path=me/mine"))


@pytest.mark.slow
def test_the_plan_is_what_is_measured() -> None:
    """The bundled model on a CPU: curves and generation within 15 per cent of what torch's allocator reports."""
    overrides = ("data.num_samples=10", "data.num_heldout=1", "data.max_new_tokens=2", "data.families=[color]")
    grid = ("space.num_depth_levels=5", "space.num_token_levels=4", "batch_size=8", "model.dtype=float32")
    grid += ("selector=cls_attention", "space=dop_split", "search=additive")
    plan = make_plan(configured("model=pocket", "model.device=cpu", "memory=2", *overrides, *grid))
    stages = {stage.name.split(":")[0]: stage for stage in plan.stages}
    loaded = load("pocket", dtype="float32", device="cpu")
    data = validation_set("pocket", num_samples=10, families=["color"])
    teacher = make_teacher(loaded, data, make_selector("cls_attention"), max_new_tokens=2, batch_size=8)
    assert stages["load"].device_bytes["weights"] == weight_bytes(loaded.model)

    with peak_memory() as peak:
        found = profile(loaded, data, teacher=teacher, grid=CurveGrid.of(5, 4), memory=2.0)
    held = stages["curves"].device_bytes
    expected = held["hidden states"] + held["a chunk of samples"]
    assert 0.85 * peak.num_bytes < expected < 1.15 * peak.num_bytes
    engine = found.store._evaluator  # type: ignore[union-attr]
    assert stages["curves"].num_layer_forwards == engine.work.layers_computed + engine.work.full_layers

    with peak_memory() as peak:
        generate_ids(loaded, data.samples[:8], 2)
    expected = stages["full model's answers"].device_bytes["keys, values, activations"]
    assert 0.85 * peak.num_bytes < expected < 1.15 * peak.num_bytes


def test_the_least_memory_is_the_least() -> None:
    config = configured("model=llava_1_5_7b", "memory=80", "data=gqa", "model.device=cuda")
    least = least_bytes(config, limit_bytes(80, "cuda"))
    assert planned("llava_1_5_7b", 80).needed_bytes == least
    assert 13 * GIB < least < 15 * GIB

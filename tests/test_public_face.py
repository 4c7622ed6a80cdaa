"""What users write, and what importing it costs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dop_search as dop
from dop_search.selectors import make_selector
from dop_search.utils.errors import BudgetError, CacheError, DopError, StrategyError, UnsupportedModelError


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_deploying_imports_neither_hydra_nor_optuna_nor_mlflow():
    code = (
        "import sys, json; from dop_search import pruned, Strategy, load; "
        "heavy = [m for m in ('hydra', 'omegaconf', 'optuna', 'mlflow', 'lmms_eval', 'pandas', 'matplotlib') "
        "if m in sys.modules]; print(json.dumps(heavy))"
    )
    assert json.loads(run_python(code)) == []


def test_importing_the_package_imports_no_torch():
    assert run_python("import sys, dop_search; print('torch' in sys.modules)").strip() == "False"


def test_every_public_name_is_there():
    assert len(dop.__all__) <= 12
    for name in dop.__all__:
        assert callable(getattr(dop, name))
    with pytest.raises(AttributeError, match="has no attribute 'prund'"):
        _ = dop.prund


@pytest.mark.slow
def test_profile_solves_without_the_model_and_survives_its_files(pocket, few_samples, teacher, tmp_path):
    from dop_search.search import CurveGrid

    grid = CurveGrid(max_all_depths=0, num_depths=3, num_token_levels=4)
    measured = dop.profile(pocket, few_samples, teacher=teacher, space="dop_split", grid=grid)
    measured.save(tmp_path)
    again = dop.Profile.load(tmp_path)
    for ratio in (0.3, 0.6, 1.0):
        strategy = measured.solve(budget=dop.Budget(flops_ratio=ratio))
        assert again.solve(budget=dop.Budget(flops_ratio=ratio)) == strategy
        assert strategy.provenance["cost_ratio"] <= ratio
        path = tmp_path / "strategy.json"
        strategy.save(path)
        assert dop.Strategy.load(path) == strategy
    assert not hasattr(again, "rerank"), "only a profile with a model evaluates strategies"
    with pytest.raises(dop.DopError, match="give it an evaluation store"):
        again.solve(budget=dop.Budget(flops_ratio=0.4), solver="rerank")
    best = measured.rerank(budget=dop.Budget(flops_ratio=0.4), num_candidates=4)
    assert best.provenance["kl_search_nats"] >= 0.0
    with pytest.raises(BudgetError, match=r"0\.001") as caught:
        again.solve(budget=dop.Budget(flops_ratio=0.001))
    assert 0.0 < caught.value.smallest_feasible < 0.3
    (tmp_path / "profile.json").write_text("{")
    with pytest.raises(CacheError, match="profile the model again"):
        dop.Profile.load(tmp_path)


@pytest.fixture(scope="module")
def two_samples(pocket):
    from dop_search.divergence import make_teacher

    samples = dop.validation_set("pocket", num_samples=2, seed=7)
    return samples, make_teacher(pocket, samples, make_selector("cls_attention"), max_new_tokens=4)


@pytest.mark.parametrize(
    "method", ["fastv", "cls_attention", pytest.param("gsop", marks=pytest.mark.slow), "short_lvlm"]
)
@pytest.mark.fast_cases(1)
def test_a_published_method_is_fitted_and_applied_in_one_call(pocket, two_samples, method):
    from dop_search.baselines import FitContext, baseline
    from dop_search.models.prompts import model_inputs

    samples, teacher = two_samples
    fitted = dop.fit(method, pocket, samples, flops_ratio=0.5, teacher=teacher)
    assert fitted.flops_ratio == pytest.approx(0.5, rel=0.1)
    step_by_step = baseline(method).fit(FitContext.from_teacher(pocket, teacher), 0.5)
    assert (fitted.strategy, fitted.hyperparameters) == (step_by_step.strategy, step_by_step.hyperparameters)
    inputs = model_inputs(pocket.processor, samples.samples[:1], pocket.adapter.device)
    full = pocket.model(**inputs).logits
    with fitted.apply(pocket.model):
        assert not pocket.model(**inputs).logits[:, -1].equal(full[:, -1])
    assert pocket.model(**inputs).logits.equal(full)


@pytest.mark.slow
def test_a_fit_asks_the_full_model_itself_and_names_what_is_wrong(pocket, few_samples, teacher, tmp_path):
    told = []
    fitted = dop.fit(
        "shortv",
        pocket,
        few_samples,
        flops_ratio=0.6,
        max_new_tokens=4,
        cache_dir=tmp_path,
        on_progress=lambda *heard: told.append(heard),
    )
    assert fitted.method == "shortv"
    assert told[0][2] == "the full model's answers"
    assert list(tmp_path.glob("evaluations-*.jsonl")), "measured divergences are kept"
    with pytest.raises(dop.DopError, match="did you mean 'fastv'"):
        dop.fit("fastvv", pocket, few_samples, flops_ratio=0.5, teacher=teacher)
    with pytest.raises(dop.DopError, match="pass that selector"):
        dop.fit("fastv", pocket, few_samples, flops_ratio=0.5, teacher=teacher, selector="random")
    with pytest.raises(BudgetError, match=r"cannot go below 0\.\d+ of the full model"):
        dop.fit("fastv", pocket, few_samples, flops_ratio=0.01, teacher=teacher)
    deeper = make_selector("cls_attention", {"layer": 1})
    with pytest.raises(dop.DopError, match=r"with its usual options.*ask for method 'uniform' with it"):
        dop.fit("cls_attention", pocket, few_samples, flops_ratio=0.5, selector=deeper)


def test_found_strategy_prunes_generation(pocket, few_samples):
    """A strategy that leaves every visual token out answers without looking; all tokens kept answers as ever."""
    from support.answers import answer_questions

    samples = few_samples.samples
    full = answer_questions(pocket, samples)
    assert answer_questions(pocket, samples, dop.Strategy.full(12)) == full
    everything = dop.Strategy.depthwise(12, 12, 12, 12, num_visual_tokens=10_000)
    assert answer_questions(pocket, samples, everything) == full
    blind = answer_questions(pocket, samples, dop.Strategy.depthwise(12, 0, 0, 0))
    assert blind != full


def test_a_strategy_for_another_model_is_refused_with_the_remedy(pocket):
    with (
        pytest.raises(StrategyError, match=r"8 decoder layers.*has 12.*for_num_layers\(12\)"),
        dop.pruned(pocket.model, dop.Strategy.full(8)),
    ):
        pass
    foreign = dop.Strategy.depthwise(12, 3, 4, 3, model_fingerprint="llava-0123456789ab")
    with pytest.raises(StrategyError, match=r"llava-0123456789ab.*search again"), dop.pruned(pocket.model, foreign):
        pass


def test_an_unsupported_model_is_refused_with_the_list():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with (
        pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*'gpt2'.*llava"),
        dop.pruned(model, dop.Strategy.full(1)),
    ):
        pass


def test_an_unsupported_checkpoint_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedModelError, match=r"model_type 'bert'.*llava"):
        dop.load(str(tmp_path))


def test_loading_what_is_not_there_names_the_remedy(tmp_path):
    with pytest.raises(DopError, match=r"cannot load 'someone/no-such-model'.*model.name_or_path=/path"):
        dop.load("someone/no-such-model")
    with pytest.raises(DopError, match="no variant 'tiny'"):
        dop.load("pocket/tiny")
    with pytest.raises(DopError, match="float8"):
        dop.load("pocket", dtype="float8")


@pytest.mark.parametrize("name", ["{folder}/absent", "./absent", "../absent/model", "~/absent", "some/deep/absent"])
def test_a_folder_that_is_not_there_is_named_as_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = Path(name.format(folder=tmp_path)).expanduser()
    with pytest.raises(DopError, match=rf"'{re.escape(str(path))}' does not exist .*set model.name_or_path"):
        dop.load(name.format(folder=tmp_path))


def test_a_folder_is_found_by_every_way_to_write_it(tmp_path, monkeypatch):
    (tmp_path / "deep" / "model").mkdir(parents=True)
    (tmp_path / "deep" / "model" / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.chdir(tmp_path / "deep")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("./model", "../deep/model", "~/deep/model", "model", str(tmp_path / "deep" / "model")):
        with pytest.raises(UnsupportedModelError, match="model_type 'bert'"):
            dop.load(name)
    with pytest.raises(DopError, match=r"config\.json' is a file; set model.name_or_path to the folder"):
        dop.load("./model/config.json")


@pytest.mark.parametrize("config", ['{"model_type": "llava_llama"}', "{}", None])
def test_a_checkpoint_in_another_format_is_refused_with_the_one_to_take(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UnsupportedModelError, match=r"(?s)model.type.*llava-hf/llava-1\.5-7b-hf.*convert"):
        dop.load(str(tmp_path))


def test_strategies_move_between_depths_by_their_ratios():
    strategy = dop.Strategy.depthwise(12, 6, 9, 3, num_visual_tokens=72)
    assert strategy.for_num_layers(32).depths() == {"q": (16,), "kv": (24,), "mlp": (8,)}
    lossless = dop.Strategy.full(12).canonical().for_num_layers(32)
    assert lossless.is_empty, "dead operations stay dead, nothing else is skipped"


def test_uniform_ranking_is_accepted_explicitly(pocket, few_samples):
    from dop_search.models.prompts import model_inputs

    inputs = model_inputs(pocket.processor, few_samples.samples[:1], pocket.adapter.device)
    num_visual = int(pocket.adapter.visual_token_mask(inputs["input_ids"]).sum())
    strategy = dop.Strategy.depthwise(12, 12, 12, 12, num_visual_tokens=5)
    with dop.pruned(pocket.model, strategy, rankings=[np.arange(num_visual)]) as model:
        output = model(**inputs)
    text = inputs["input_ids"].shape[1] - num_visual
    assert output.past_key_values.layers[0].keys.shape[-2] == text + 5

"""What users write, and what importing it costs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dop_search as dop
from dop_search.utils.errors import BudgetError, CacheError, DopError, StrategyError, UnsupportedModelError


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


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
    for name in dop.__all__:
        assert callable(getattr(dop, name))
    with pytest.raises(AttributeError, match="has no attribute 'prund'"):
        _ = dop.prund


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
    best = measured.rerank(budget=dop.Budget(flops_ratio=0.4), num_candidates=4)
    assert best.provenance["kl_search_nats"] >= 0.0
    with pytest.raises(BudgetError, match=r"0\.001") as caught:
        again.solve(budget=dop.Budget(flops_ratio=0.001))
    assert 0.0 < caught.value.smallest_feasible < 0.3
    (tmp_path / "profile.json").write_text("{")
    with pytest.raises(CacheError, match="profile the model again"):
        dop.Profile.load(tmp_path)


def test_found_strategy_prunes_generation(pocket, few_samples):
    """A strategy that leaves every visual token out answers without looking; all tokens kept answers as ever."""
    from dop_search.evaluation import answer_questions

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
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with (
        pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*'llama'.*llava"),
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

"""The engine's shortcuts change no number: everything is compared with plain forwards of the pruned model."""

import numpy as np
import pytest
import torch

from dop_search.data.validation import validation_set
from dop_search.divergence import DivergenceEngine, kl_divergence, make_teacher
from dop_search.divergence.profiling import Profile, profile
from dop_search.search import CurveGrid
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.strategy.cost.kv_cache import strategy_kv_bytes
from dop_search.testing.naive import naive_divergence
from dop_search.utils.errors import DopError, NumericalError

LAYERS = 12


def random_strategies(count, seed):
    rng = np.random.default_rng(seed)
    result = []
    for index in range(count):
        kept = None if index % 3 == 0 else int(rng.integers(1, 140))
        if index % 4 == 3:
            runs = rng.random((2, LAYERS, 3)) < 0.6
            result.append(Strategy.from_array(runs, shares=(0.25, 0.75), num_visual_tokens=kept))
        else:
            q, kv, mlp = (int(depth) for depth in rng.integers(0, LAYERS + 1, 3))
            result.append(Strategy.depthwise(LAYERS, q, kv, mlp, num_visual_tokens=kept))
    return result


@pytest.mark.slow
def test_equals_naive_evaluation(pocket, few_samples, teacher):
    strategies = random_strategies(5, seed=0)
    scores = DivergenceEngine(pocket.adapter, teacher, batch_size=4).evaluate(strategies)
    naive = np.stack([naive_divergence(pocket, few_samples.samples, teacher, strategy) for strategy in strategies])
    assert naive.max() > 0.01, "the strategies must do something"
    np.testing.assert_allclose(scores, naive, rtol=2e-3, atol=2e-5)


def test_empty_strategy_is_exactly_zero_and_nothing_is_negative(pocket, teacher):
    engine = DivergenceEngine(pocket.adapter, teacher)
    scores = engine.evaluate([Strategy.full(LAYERS), *random_strategies(4, seed=1)])
    assert (scores[0] == 0.0).all()
    assert (scores >= 0.0).all()


@pytest.mark.parametrize(
    "switch",
    [
        {"share_prefixes": False},
        {"early_start": False},
        {"keep_prefix": False},
        {"keep_states": False},
    ],
    ids=str,
)
@pytest.mark.fast_cases(1)
def test_shortcuts_change_no_number(pocket, teacher, switch):
    strategies = random_strategies(6, seed=2)
    with_shortcut = DivergenceEngine(pocket.adapter, teacher, batch_size=3)
    without = DivergenceEngine(pocket.adapter, teacher, batch_size=3, **switch)
    np.testing.assert_allclose(with_shortcut.evaluate(strategies), without.evaluate(strategies), rtol=2e-3, atol=2e-5)


def test_sharing_computes_fewer_layers(pocket, teacher):
    strategies = [Strategy.depthwise(LAYERS, d, LAYERS, m) for d in (8, 9, 10) for m in (4, 5)]
    engine = DivergenceEngine(pocket.adapter, teacher, batch_size=6)
    engine.evaluate(strategies)
    alone = DivergenceEngine(pocket.adapter, teacher, batch_size=6, share_prefixes=False, early_start=False)
    alone.evaluate(strategies)
    assert alone.work.layers_computed == alone.work.layers_asked
    # MLP exits after 4 or 5 layers: two stems start there (one layer apart), three branches leave each at 8, 9, 10
    assert engine.work.layers_computed < alone.work.layers_computed / 2


def test_some_samples_only(pocket, teacher):
    strategies = random_strategies(3, seed=3)
    engine = DivergenceEngine(pocket.adapter, teacher, batch_size=2)
    everything = engine.evaluate(strategies)
    np.testing.assert_allclose(engine.evaluate(strategies, [4, 1]), everything[:, [4, 1]], rtol=2e-3, atol=2e-5)


@pytest.mark.slow
def test_batch_size_changes_no_number(pocket, teacher):
    strategies = random_strategies(4, seed=4)
    one = DivergenceEngine(pocket.adapter, teacher, batch_size=1).evaluate(strategies)
    many = DivergenceEngine(pocket.adapter, teacher, batch_size=6).evaluate(strategies)
    np.testing.assert_allclose(one, many, rtol=2e-3, atol=2e-5)


def test_per_token_averaging_weighs_every_answer_token(pocket):
    data = validation_set("pocket", num_samples=4, families=["color", "describe"])
    teacher = make_teacher(pocket, data, make_selector("cls_attention"))
    strategies = random_strategies(2, seed=5)
    per_sample = DivergenceEngine(pocket.adapter, teacher).evaluate(strategies)
    per_token = DivergenceEngine(pocket.adapter, teacher, averaging="per_token").evaluate(strategies)
    lengths = np.array([len(sample.answer_ids) for sample in teacher.samples])
    np.testing.assert_allclose(per_token.mean(axis=1), (per_sample * lengths).sum(axis=1) / lengths.sum(), rtol=1e-6)
    some = DivergenceEngine(pocket.adapter, teacher, averaging="per_token").evaluate(strategies, [1, 3])
    assert lengths[[1, 3]].mean() > 1.5 * lengths.mean()
    np.testing.assert_allclose(some, per_token[:, [1, 3]], rtol=2e-3, atol=2e-5)


def test_refuses_a_strategy_whose_tokens_another_selector_ranks(pocket, teacher):
    engine = DivergenceEngine(pocket.adapter, teacher)
    ranked = Strategy.depthwise(LAYERS, 6, 6, 6, num_visual_tokens=50, selector="random", selector_options={"seed": 1})
    with pytest.raises(DopError, match=r"selector 'random' .* cannot be scored on tokens that ClsAttention"):
        engine.evaluate([ranked])
    unranked = Strategy.depthwise(LAYERS, 6, 6, 6, selector="random")  # all tokens alike: no ranking is read
    same = Strategy.depthwise(LAYERS, 6, 6, 6)
    assert (engine.evaluate([unranked]) == engine.evaluate([same])).all()


def test_a_profile_refuses_a_teacher_of_another_selector(pocket, few_samples, teacher):
    with pytest.raises(DopError, match="`teacher` has its tokens ranked by ClsAttention"):
        profile(pocket, few_samples, selector="random", teacher=teacher)


def test_budgets_in_bytes_count_the_models_own_elements(pocket, few_samples, teacher, tmp_path):
    grid = CurveGrid.of(2, 2)
    found = profile(pocket, few_samples, teacher=teacher, space="uniform", grid=grid)
    assert found.bytes_per_element == 4  # float32
    found.save(tmp_path)
    for one in (found, Profile.load(tmp_path)):
        strategy = one.solve(Budget(kv_bytes=700_000.0))
        held = [strategy_kv_bytes(one.dims, strategy, counts, bytes_per_element=4) for counts in one.counts]
        assert 600_000 < np.mean(held) <= 700_000


def test_positions_average_to_the_samples_divergence(pocket, teacher):
    engine = DivergenceEngine(pocket.adapter, teacher)
    strategies = [*random_strategies(3, seed=11), Strategy.full(12)]
    values = engine.by_position(strategies)
    assert [[len(item) for item in its] for its in values] == [[len(s.answer_ids) for s in teacher.samples]] * 4
    means = [[item.mean() for item in its] for its in values]
    np.testing.assert_allclose(means, engine.evaluate(strategies), rtol=1e-9, atol=1e-12)
    assert all(not item.any() for item in values[3])


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    p, q = torch.randn(5, 11).log_softmax(-1), torch.randn(5, 11).log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl_divergence(p, q), expected)


def test_kl_is_finite_where_the_teacher_says_impossible():
    p = torch.tensor([[0.0, -torch.inf]])
    assert kl_divergence(p, torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(np.log(2.0))


def test_nan_logits_name_sample_and_strategy(pocket, teacher, monkeypatch):
    weight = pocket.model.model.language_model.norm.weight
    original = weight.data.clone()
    try:
        weight.data[0] = torch.nan
        with pytest.raises(NumericalError, match=r"pocket/search.*n_v=10.*dtype"):
            DivergenceEngine(pocket.adapter, teacher).evaluate([Strategy.full(LAYERS, num_visual_tokens=10)])
    finally:
        weight.data.copy_(original)


def test_refuses_a_strategy_of_another_depth(pocket, teacher):
    with pytest.raises(DopError, match=r"7 layers.*12"):
        DivergenceEngine(pocket.adapter, teacher).evaluate([Strategy.full(7)])


def test_refuses_an_unknown_averaging(pocket, teacher):
    with pytest.raises(DopError, match="per_word"):
        DivergenceEngine(pocket.adapter, teacher, averaging="per_word")


def test_another_divergence_with_several_values_per_position(pocket, teacher):
    """Columns come back as asked for, in the order of the samples; KL among them is the engine's own."""

    def both(log_p, log_q):
        return torch.stack([2.0 * kl_divergence(log_p, log_q), (log_q - log_p).abs().amax(dim=-1)], dim=-1)

    strategies = [Strategy.full(LAYERS), *random_strategies(3, seed=5)]
    plain = DivergenceEngine(pocket.adapter, teacher, batch_size=2)
    values = DivergenceEngine(pocket.adapter, teacher, batch_size=2, divergence=both).evaluate(strategies, [4, 1, 0])
    assert values.shape == (4, 3, 2)
    assert (values[0] == 0.0).all()
    np.testing.assert_allclose(values[..., 0], 2.0 * plain.evaluate(strategies, [4, 1, 0]), rtol=2e-3, atol=2e-5)
    assert (values[1:, :, 1] > 0.0).all()
    assert plain.evaluate([]).shape == (0, len(teacher.samples))

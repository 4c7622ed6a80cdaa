"""The quicker linear layers compute the same, and leave nothing behind."""

import pytest
import torch
from torch import nn

from dop_search.models import fast_linear as module
from dop_search.models.fast_linear import available, fast_linear


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False))


@pytest.mark.skipif(not available(), reason="this torch has no oneDNN linear operator")
@pytest.mark.parametrize("shape", [(200, 24), (4, 50, 24), (3, 24), (1, 70, 24)])
def test_same_numbers(network, shape, monkeypatch):
    monkeypatch.setattr(module, "measured_speedup", lambda: 2.0)
    rows = torch.randn(shape)
    with torch.no_grad():
        expected = network(rows)
        with fast_linear(network) as switched:
            assert switched == 2
            torch.testing.assert_close(network(rows), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(network(rows), expected)
    assert all("forward" not in vars(part) for part in network)


def test_nothing_is_switched_without_a_gain(network, monkeypatch):
    monkeypatch.setattr(module, "measured_speedup", lambda: 1.0)
    with fast_linear(network) as switched:
        assert switched == 0


def test_gradients_still_flow(network, monkeypatch):
    monkeypatch.setattr(module, "measured_speedup", lambda: 2.0)
    with fast_linear(network):
        network(torch.randn(100, 24)).sum().backward()
    assert network[0].weight.grad is not None


def test_restored_after_an_exception(network, monkeypatch):
    monkeypatch.setattr(module, "measured_speedup", lambda: 2.0)

    def use():
        with fast_linear(network):
            network(torch.randn(100, 25))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        use()
    assert all("forward" not in vars(part) for part in network)

"""The gated norm as one node of a graph for a GPU: what it is, and that it changes nothing."""

import pytest
import torch

from metala_vision.kernels.gated_norm import gated_norm, library
from tests._numerics import SAME, relative_rms
from tests.kernels._cases import norm_inputs
from tests.kernels._common import (
    assert_inlined,
    assert_second_derivatives_refused,
    graph_of,
    one_node,
)

NODE = "metala_vision.gated_norm"
CASES = {
    "gate": ({}, "layer"),
    "key": ({"aug": "k"}, "layer"),
    "norm alone": ({"aug": None, "bias": False}, "rms"),
}


@pytest.fixture
def wanted(monkeypatch):
    """As on a GPU with kernels."""
    monkeypatch.setattr(library, "wanted", lambda device: True)


def case(name, dtype=torch.float32):
    shape, norm = CASES[name]
    given = norm_inputs(9, K=4, V=6, dtype=dtype, **shape)
    return {key: x.detach().requires_grad_() for key, x in given.items()}, norm


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_registered_as_torch_wants_it(name):
    given, norm = case(name)
    names = ("o", "output_gate", "bias", "q", "k", "gate", "v", "w_aug")
    torch.library.opcheck(library.node, (*(given.get(n) for n in names), 16.0, norm, 1e-5))


@one_node
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_holds_one_node_and_gives_eagers_gradients(name, autocast, wanted):
    eager, norm = case(name, torch.bfloat16 if autocast else torch.float32)
    compiled, _ = case(name, torch.bfloat16 if autocast else torch.float32)

    def step(tensors):
        return gated_norm(**tensors, norm=norm)

    expected = step(eager)
    expected.float().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        graph, _ = graph_of(step, compiled)
        torch.compiler.reset()
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
        found.float().square().sum().backward()
    assert graph.count(NODE) == 1 and "tanh" not in graph and "layer_norm" not in graph
    assert torch.equal(found, expected)
    for key, x in compiled.items():
        assert x.grad is not None and x.grad.dtype == x.dtype
        assert relative_rms(x.grad, eager[key].grad) <= SAME, key


@one_node
def test_on_a_cpu_in_float64_and_for_another_form_it_is_inlined(monkeypatch):
    given, _ = case("gate")
    assert not library.wanted(torch.device("cpu"))
    assert NODE not in graph_of(lambda x: gated_norm(**x), given)[0]
    monkeypatch.setattr(library, "wanted", lambda device: True)
    assert NODE not in graph_of(lambda x: gated_norm(**x, impl="portable"), given)[0]
    given, _ = case("gate", torch.float64)
    assert NODE not in graph_of(lambda x: gated_norm(**x), given)[0]


def test_exports_and_functional_gradients_inline_it(wanted):
    given, _ = case("gate")
    assert_inlined(NODE, lambda x: gated_norm(**x), given)


@one_node
def test_a_second_derivative_is_refused_and_not_zero(wanted):
    given, _ = case("gate")
    assert_second_derivatives_refused("gated_norm", lambda: gated_norm(**given), given["q"])

"""The depthwise convolution as one node of a graph for a GPU: what it is, and that it changes
nothing."""

import pytest
import torch

from metala_vision.kernels.depthwise_conv import depthwise_conv_silu, library
from tests._numerics import SAME, bound, relative_rms
from tests.kernels._cases import CONV_MODES, conv_inputs
from tests.kernels.test_library import graph_of, one_node

NODE = "metala_vision.depthwise_conv_silu"


@pytest.fixture
def wanted(monkeypatch):
    """As on a GPU with kernels."""
    monkeypatch.setattr(library, "wanted", lambda device: True)


def case(mode, dtype=torch.float32):
    """Tensors that take gradients, and a call of them."""
    inputs, padding = conv_inputs(dtype=dtype, **CONV_MODES[mode])

    def step(tensors, **options):
        return depthwise_conv_silu(**tensors, **padding, **options)

    return {name: t.detach().requires_grad_() for name, t in inputs.items()}, step


@pytest.mark.parametrize("mode", CONV_MODES)
def test_the_operator_is_registered_as_torch_wants_it(mode):
    inputs, padding = conv_inputs(**CONV_MODES[mode])
    given = [inputs["x"], inputs["weight"], inputs.get("bias")]
    given = [None if t is None else t.detach().requires_grad_() for t in given]
    torch.library.opcheck(library.node, (*given, *padding.values()))


@one_node
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["3x3, bias", "causal", "backward"])
def test_a_compiled_step_holds_one_node_and_gives_eagers_gradients(mode, autocast, wanted):
    """Under autocast the map is cast and the weights, which the kernels read as they are, not."""
    (eager, step), (compiled, _) = case(mode), case(mode)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = step(eager)
        expected.float().square().sum().backward()
        graph, _ = graph_of(step, compiled)
        torch.compiler.reset()
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
        found.float().square().sum().backward()
    assert graph.count(NODE) == 1 and "silu(" not in graph and "conv2d" not in graph
    assert found.dtype == expected.dtype
    # The same function of the same rounded map; without autocast the same bits.
    limit = bound(torch.bfloat16, "y") if autocast else SAME
    assert relative_rms(found, expected) <= limit
    for key, t in compiled.items():
        assert t.grad is not None and t.grad.dtype == t.dtype
        assert relative_rms(t.grad, eager[key].grad) <= limit, key


@one_node
def test_on_a_cpu_in_float64_and_for_another_form_it_is_inlined(monkeypatch):
    given, step = case("3x3")
    assert not library.wanted(torch.device("cpu"))
    assert NODE not in graph_of(step, given)[0]
    monkeypatch.setattr(library, "wanted", lambda device: True)
    assert NODE in graph_of(step, given)[0]
    assert NODE not in graph_of(lambda t: step(t, impl="portable"), given)[0]
    given, step = case("3x3", torch.float64)
    assert NODE not in graph_of(step, given)[0]


def test_exports_and_functional_gradients_inline_it(wanted):
    given, step = case("3x3, bias")
    plain = {key: t.detach() for key, t in given.items()}

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return step(tensors)

    for strict in (False, True):
        assert NODE not in str(torch.export.export(Module(), (plain,), strict=strict).graph)
    gradient = torch.func.grad(lambda t: step(t).square().sum())
    found = torch.compile(gradient, fullgraph=True, backend="aot_eager")(plain)
    expected = gradient(plain)
    assert all(relative_rms(found[key], expected[key]) <= SAME for key in plain)


@one_node
def test_a_second_derivative_is_refused_and_not_zero(wanted):
    given, step = case("3x3")
    compiled = torch.compile(lambda t: step(t).square().sum(), backend="eager")
    with pytest.raises(RuntimeError, match="depthwise_conv_silu has no second derivatives"):
        torch.autograd.grad(compiled(given), [given["x"]], create_graph=True)

"""The depthwise convolution as one node of a graph for a GPU: what it is, and that it changes
nothing."""

import pytest
import torch

from metala_vision.kernels.depthwise_conv import (
    api,
    depthwise_conv_silu,
    depthwise_conv_silu_op,
    fused,
    library,
)
from tests._numerics import SAME, bound, relative_rms
from tests.kernels._cases import CONV_MODES, conv_inputs
from tests.kernels._common import (
    assert_close,
    assert_inlined,
    assert_second_derivatives_refused,
    every_gradient,
    graph_of,
    one_node,
)

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


@pytest.mark.parametrize("mode", ["3x3, bias", "causal"])
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
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_a_frozen_tensor_has_no_gradient_and_the_others_theirs(frozen, wanted):
    (eager, step), (compiled, _) = case("3x3, bias"), case("3x3, bias")
    for given, form in (
        (eager, step),
        (compiled, torch.compile(step, fullgraph=True, backend="aot_eager")),
    ):
        given[frozen].requires_grad_(False)
        form(given).square().sum().backward()
    for key, t in compiled.items():
        if key == frozen:
            assert t.grad is None
        else:
            assert relative_rms(t.grad, eager[key].grad) <= SAME


@pytest.fixture
def as_auto(monkeypatch):
    """As on a GPU, where "auto" is "triton"; the library's convolution for the kernels'."""

    def backward(d_y, x, weight, bias, top, left, of_x, of_taps):
        found = iter(library._gradients(d_y, x, weight, bias, top, left, of_x, of_taps))
        asked = (of_x, of_taps, of_taps and bias is not None)
        return [next(found) if there else None for there in asked]

    monkeypatch.setattr(api, "implementations", lambda *_: ("triton", "portable"))
    monkeypatch.setattr(api, "carries_tuples", lambda: True)
    monkeypatch.setattr(fused, "forward", fused.alike)
    monkeypatch.setattr(fused, "backward", backward)


def test_second_and_many_gradients_under_autocast(as_auto):
    """There x has 16 bits and the parameters 32."""
    results = []
    for impl in ("auto", "portable"):
        leaves, step = case("3x3, bias")
        inputs = list(leaves.values())
        with torch.autocast("cpu", torch.bfloat16):
            y = step(leaves, impl=impl)
        assert ("Fused" in type(y.grad_fn).__name__) == (impl == "auto")
        results.append(every_gradient(y, inputs, leaves["x"]))
    # Each rounds to 16 bits at its own places, the second derivatives twice.
    assert_close(*results, 4 * bound(torch.bfloat16, "gate"))


def test_what_does_not_fit_is_left_to_the_library_to_refuse(as_auto):
    """A layer's call is not validated, and the kernels would write beyond the map."""
    x, weight = torch.zeros(1, 3, 3, 8), torch.zeros(8, 3, 3)
    assert depthwise_conv_silu_op(x, weight, None, 1, 1).shape == x.shape
    for wrong in (x[..., :7], torch.zeros(1, 3, 3, 10), x.double()):
        with pytest.raises(RuntimeError):
            depthwise_conv_silu_op(wrong, weight, None, 1, 1)
    for bias in (torch.zeros(7), torch.zeros(8).double()):
        with pytest.raises(RuntimeError):
            depthwise_conv_silu_op(x, weight, bias, 1, 1)


def test_a_batch_of_none_is_a_batch(as_auto):
    x, weight = torch.zeros(0, 3, 3, 8, requires_grad=True), torch.zeros(8, 3, 3)
    y = depthwise_conv_silu_op(x, weight, None, 1, 1)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape and "Fused" not in type(y.grad_fn).__name__


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
    assert_inlined(NODE, step, given)


@one_node
def test_a_second_derivative_is_refused_and_not_zero(wanted):
    given, step = case("3x3")
    assert_second_derivatives_refused("depthwise_conv_silu", lambda: step(given), given["x"])

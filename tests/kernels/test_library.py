"""The operator as one node of a compiled graph: what it is, and that it changes nothing."""

import pytest
import torch

from metala_vision.kernels.gated_linear_attention import (
    DIRECTIONS,
    gated_linear_attention,
    gated_linear_attention_op,
)
from metala_vision.kernels.gated_linear_attention.library import node
from tests._numerics import SAME, normal, relative_rms
from tests.kernels._common import assert_second_derivatives_refused, graph_of, one_node

B, N, H, K, V = 2, 33, 2, 4, 6


def inputs(dtype=torch.float32, grad=True):
    tensors = {"q": K, "v": V, "k": K, "gate": K}
    return {
        n: normal(B, N, H, e, seed=i, dtype=dtype).requires_grad_(grad)
        for i, (n, e) in enumerate(tensors.items())
    }


@pytest.mark.parametrize(
    "arguments",
    [
        lambda x: (x["q"], x["v"], None, x["gate"], None, 16.0, 0.5, "bidirectional", None),
        lambda x: (x["q"], x["v"], x["k"], None, -x["gate"].detach().abs(), 16.0, 0.5, "forward",
                   torch.arange(N).flip(0)),
        lambda x: (x["q"], x["v"], x["k"], None, None, 16.0, 0.5, "backward", None),
    ],
    ids=["gate", "log decay, key, order", "undecayed"],
)  # fmt: skip
def test_the_operator_is_registered_as_torch_wants_it(arguments):
    torch.library.opcheck(node, arguments(inputs()))


@one_node
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_step_holds_one_node_and_gives_eagers_gradients(direction, autocast):
    dtype = torch.bfloat16 if autocast else torch.float32

    def step(q, v, k, gate):
        return gated_linear_attention(q, v, gate=gate, direction=direction)

    eager, compiled = inputs(dtype), inputs(dtype)
    expected = step(**eager)
    expected.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        graph, _ = graph_of(step, *compiled.values())
        torch.compiler.reset()
        compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = compiled_step(**compiled)
        found.square().sum().backward()
    assert graph.count("metala_vision.gated_linear_attention") == 1 and "matmul" not in graph
    assert torch.equal(found, expected)
    for name in ("q", "v", "gate"):
        assert relative_rms(compiled[name].grad, eager[name].grad) <= SAME, name
    assert compiled["k"].grad is None


def test_states_and_exports_are_inlined():
    x = inputs(grad=False)

    def with_state(q, v, gate):
        return gated_linear_attention(q, v, gate=gate, direction="forward", output_final_state=True)

    graph, (_, state) = graph_of(with_state, x["q"], x["v"], x["gate"])
    assert "matmul" in graph and state.shape == (B, H, K, V)

    class Module(torch.nn.Module):
        def forward(self, q, v, gate):
            return gated_linear_attention(q, v, gate=gate)

    for strict in (False, True):
        exported = torch.export.export(Module(), (x["q"], x["v"], x["gate"]), strict=strict)
        assert "metala_vision.gated" not in str(exported.graph)


@one_node
def test_a_second_derivative_is_refused_and_not_zero():
    x = inputs()

    def step():
        return gated_linear_attention(x["q"], x["v"], gate=x["gate"])

    assert_second_derivatives_refused("gated_linear_attention", step, x["gate"])


@one_node
def test_what_a_layer_passes_in_sixteen_bits():
    """q and v in bfloat16, key and decay in float32, gradients for some."""
    q, v = (normal(B, N, H, e, seed=e).bfloat16().requires_grad_() for e in (K, V))
    log_decay = -normal(B, N, H, K, seed=3, dtype=torch.float32).abs()
    key = (1 - log_decay.exp()).requires_grad_()
    arguments = (q, v, key, None, log_decay, 16.0, 0.5, "bidirectional", None)
    eager = gated_linear_attention_op(*arguments)
    expected = torch.autograd.grad(eager.float().sum(), (q, v, key))
    torch.compiler.reset()
    compiled = torch.compile(gated_linear_attention_op, fullgraph=True, backend="aot_eager")
    found = compiled(*arguments)
    assert torch.equal(found, eager)
    gradients = torch.autograd.grad(found.float().sum(), (q, v, key))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_functional_gradients_compile():
    x = inputs(torch.float64, grad=False)

    def loss(q, v, gate):
        return gated_linear_attention(q, v, gate=gate).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 2))
    arguments = x["q"], x["v"], x["gate"]
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*arguments), gradient(*arguments), strict=True):
        assert relative_rms(ours, expected) <= 1e-13

"""The gated norm's kernels in Triton's interpreter, on the CPU: `make test-kernels`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from metala_vision.kernels._fused import interpreted
from metala_vision.kernels.gated_linear_attention import gated_linear_attention
from metala_vision.kernels.gated_norm import gated_norm, library
from tests._numerics import GATES, SAME, bound
from tests.kernels._cases import NORM_MODES, norm_errors, norm_inputs
from tests.kernels._common import INTERPRETER, assert_close, every_gradient, not_taken, one_node

if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from metala_vision.kernels import _triton
from metala_vision.kernels.gated_norm import triton_bwd, triton_fwd

pytestmark = [*INTERPRETER, pytest.mark.usefixtures("poisoned")]
RULE = bound(torch.float32, "y")


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("mode", NORM_MODES)
def test_every_mode_and_gate_set_meets_the_rule(mode, gates):
    measured = norm_errors(21, gates, **NORM_MODES[mode])
    assert max(measured.values()) <= RULE, measured


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 64), st.integers(1, 3), st.integers(1, 3), st.integers(1, 128),
    st.integers(1, 256), st.sampled_from(list(NORM_MODES)),
)  # fmt: skip
def test_any_shape_meets_the_rule(N, B, H, K, V, mode):
    measured = norm_errors(N, "N(0,5)", B=B, H=H, K=K, V=V, **NORM_MODES[mode])
    # A width of one is its own mean: 0 times the factor, and what rounding leaves of a gradient.
    skip = {"o", "q", "k", "gate", "v", "w_aug"} if V == 1 else set()
    assert max(e for name, e in measured.items() if name not in skip) <= RULE, measured


def test_programs_of_several_tiles_meet_the_rule(monkeypatch):
    monkeypatch.setattr(triton_bwd, "MAX_PARTS", 3)
    monkeypatch.setattr(triton_fwd, "TILE", 64)  # tiles of 4 rows: 5 a program
    measured = norm_errors(27, "N(0,1)")
    assert max(measured.values()) <= RULE, measured


def test_tanh_is_exact_near_0_and_far_away():
    x = torch.linspace(-12, 12, 4096, dtype=torch.float64)
    x = torch.cat([x, x * 1e-5]).float()
    y = torch.zeros_like(x)

    @_triton.triton.jit
    def kernel(p_x, p_y):
        o = _triton.tl.arange(0, 8192)
        _triton.tl.store(p_y + o, triton_fwd.tanh(_triton.tl.load(p_x + o)))

    kernel[(1,)](x, y)
    exact = torch.tanh(x.double())
    # 4 roundings of 2^-24
    assert ((y.double() - exact).abs() <= 4 * 2.0**-24 * exact.abs()).all()
    assert not torch.equal(y, x)


def call(given, **options):
    given = {name: x.detach().requires_grad_() for name, x in given.items()}
    y = gated_norm(**given, impl="triton", **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(given.values()))]


def test_strides_a_sample_alone_and_every_run_give_the_same_bits():
    given = norm_inputs(20)
    assert not given["q"].is_contiguous()
    first = call(given)
    plain = call({name: x.contiguous() for name, x in given.items()})
    again = call(given)
    assert all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, plain, again, strict=True)
    )
    whole = {"bias", "w_aug"}  # have no sample
    alone = call({name: x if name in whole else x[1:] for name, x in given.items()})
    for name, a, b in zip(["y", *given], first, alone, strict=True):
        assert name in whole or torch.equal(a[1:], b), name


@pytest.mark.parametrize("value", [-float("inf"), -1e30, -300.0, 300.0, float("inf")])
def test_extreme_gates_stay_finite(value):
    given = norm_inputs(20)
    changed = call({**given, "gate": torch.full_like(given["gate"], value)})
    assert all(torch.isfinite(x).all() for x in changed)
    if abs(value) <= 300:  # SiLU(inf) is inf
        changed = call({**given, "output_gate": torch.full_like(given["output_gate"], value)})
        assert all(torch.isfinite(x).all() for x in changed)


def leaves():
    return {name: x.detach().requires_grad_() for name, x in norm_inputs(5).items()}


def test_by_name_only_on_a_cpu_and_only_the_inputs_are_saved():
    given = leaves()
    assert "Fused" not in type(gated_norm(**given).grad_fn).__name__
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = gated_norm(**given, impl="triton")
    assert "Fused" in type(y.grad_fn).__name__
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in given.values()}


def test_an_expanded_incoming_gradient_one_gradient_and_checkpointing():
    given = leaves()
    y = gated_norm(**given, impl="triton")
    (of_sum,) = torch.autograd.grad(y.sum(), given["v"], retain_graph=True)
    assert torch.equal(of_sum, torch.autograd.grad(y, given["v"], torch.ones_like(y))[0])
    y = checkpoint(lambda: gated_norm(**given, impl="triton"), use_reentrant=False)
    assert torch.equal(of_sum, torch.autograd.grad(y.sum(), given["v"])[0])


def made_of_one_another(impl):
    """As in a layer: o depends on q and v."""
    given = leaves()
    made = {**given, "o": (given["o"] + 2 * given["v"] * given["q"].sum(3, keepdim=True)).tanh()}
    return given, gated_norm(**made, impl=impl)


def test_second_and_many_gradients_are_the_portable_forms_of_dependent_inputs_too():
    results = []
    for impl in ("triton", "portable"):
        given, y = made_of_one_another(impl)
        inputs = list(given.values())
        plain = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
        results.append(every_gradient(y, inputs, given["v"]))
        assert_close(results[-1][: len(inputs)], plain, SAME)
    assert_close(*results, 10 * SAME)


@not_taken
def test_what_the_kernels_do_not_take_is_named(dtype, message):
    given = norm_inputs(5, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        gated_norm(**given, impl="triton")


def test_a_mixers_gradients_with_a_graph_are_those_without(monkeypatch):
    """Both operators through the kernels: queries, values and gates reach the norm twice."""
    from metala_vision.layers import MetaLAMixer, metala

    monkeypatch.setattr(
        metala, "gated_linear_attention_op",
        lambda q, v, k, gate, log_decay, divisor, scale, direction, order: gated_linear_attention(
            q, v, k, gate=gate, log_decay=log_decay, gate_divisor=divisor, scale=scale,
            direction=direction, order=order, impl="triton",
        ),
    )  # fmt: skip
    monkeypatch.setattr(
        metala, "gated_norm_op",
        lambda o, g, b, q, k, gate, v, w, divisor, norm, eps: gated_norm(
            o, g, b, q=q, k=k, gate=gate, v=v, w_aug=w, gate_divisor=divisor, norm=norm, eps=eps,
            impl="triton",
        ),
    )  # fmt: skip
    for rope in (False, True):
        mixer = MetaLAMixer(16, 2, rope=rope)
        torch.nn.init.normal_(mixer.w_aug)
        x = torch.randn(1, 3, 3, 16, requires_grad=True)
        inputs = [x, *mixer.parameters()]
        loss = mixer(x).square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        plain = torch.autograd.grad(loss, inputs)
        assert_close(first, plain, 10 * SAME)


@one_node
@pytest.mark.parametrize("more", [{}, {"aug": "k"}, {"aug": None, "bias": False}])
def test_the_compiled_node_runs_the_same_kernels(more, monkeypatch):
    """As on a GPU, forward and backward."""
    monkeypatch.setattr(library, "wanted", lambda device: True)
    monkeypatch.setattr(library, "takes_kernels", lambda x: True)
    leaves = {name: x.detach().requires_grad_() for name, x in norm_inputs(20, **more).items()}
    results = []
    for form in (
        torch.compile(lambda x: gated_norm(**x), fullgraph=True, backend="aot_eager"),
        lambda x: gated_norm(**x, impl="triton"),
    ):
        y = form(leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

"""The depthwise convolution's kernels in Triton's interpreter, on the CPU: `make test-kernels`."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from metala_vision.kernels._fused import interpreted
from metala_vision.kernels.depthwise_conv import api, depthwise_conv_silu, fused, library
from tests._numerics import SAME, bound
from tests.kernels._cases import CONV_MODES, conv_errors, conv_inputs
from tests.kernels._common import INTERPRETER, assert_close, every_gradient, not_taken, one_node

if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from metala_vision.kernels.depthwise_conv import triton_bwd, triton_fwd

pytestmark = [*INTERPRETER, pytest.mark.usefixtures("poisoned")]
RULE = bound(torch.float32, "y")


@pytest.mark.parametrize(
    ("mode", "grid"), [*product(CONV_MODES, [(1, 1), (5, 7)]), ("3x3, bias", (14, 14))]
)
def test_every_mode_meets_the_rule(mode, grid):
    measured = conv_errors(grid, **CONV_MODES[mode])
    assert max(measured.values()) <= RULE, measured


@settings(max_examples=10, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 3), st.integers(1, 130),
    st.sampled_from(list(CONV_MODES)),
)  # fmt: skip
def test_any_shape_meets_the_rule(grid, B, C, mode):
    measured = conv_errors(grid, B=B, C=C, **CONV_MODES[mode])
    assert max(measured.values()) <= RULE, measured


def test_programs_of_several_tiles_give_the_same_output_and_meet_the_rule(monkeypatch):
    def outputs():
        y, gradients = call(*conv_inputs(bias=True))
        return y, gradients["x"]

    first = outputs()
    monkeypatch.setattr(triton_bwd, "MAX_PARTS", 3)
    monkeypatch.setattr(triton_fwd, "PROGRAMS", 5)
    monkeypatch.setattr(triton_fwd, "TILE", 128)
    measured = conv_errors(bias=True)
    assert max(measured.values()) <= RULE, measured
    assert all(torch.equal(a, b) for a, b in zip(first, outputs(), strict=True))


def call(inputs, padding):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = depthwise_conv_silu(**leaves, **padding, impl="triton")
    found = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    return y.detach(), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("mode", ["3x3, bias", "causal", "lopsided"])
def test_strides_a_sample_alone_and_every_run_give_the_same_bits(mode):
    inputs, padding = conv_inputs(**CONV_MODES[mode])
    x = inputs["x"]
    assert not x.is_contiguous()
    y, gradients = call(inputs, padding)
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for other in (x.contiguous(), x, channels_first):
        again, found = call({**inputs, "x": other}, padding)
        assert torch.equal(y, again)
        assert all(torch.equal(gradients[name], found[name]) for name in inputs)
    alone, found = call({**inputs, "x": x[1:]}, padding)
    assert torch.equal(y[1:], alone) and torch.equal(gradients["x"][1:], found["x"])


# exp(200) is inf, and 1 / inf the sigmoid that is wanted.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("value", [-1e30, -200.0, 200.0, 1e30])
def test_large_inputs_stay_finite(value):
    inputs, padding = conv_inputs(C=4)
    leaves = {**inputs, "x": torch.full_like(inputs["x"], value)}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = depthwise_conv_silu(**leaves, **padding, impl="triton")
    found = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert torch.isfinite(y).all() and all(torch.isfinite(t).all() for t in found)


def test_what_is_outside_the_grid_is_never_read():
    """Rows lie in a larger map whose other rows are NaN."""
    inputs, padding = conv_inputs((4, 6))
    wide = torch.full((2, 6, 8, 20), float("nan"))
    wide[:, 1:5, 1:7] = inputs["x"]
    y, gradients = call({**inputs, "x": wide[:, 1:5, 1:7]}, padding)
    expected, exact = call(inputs, padding)
    assert torch.equal(y, expected)
    assert all(torch.equal(gradients[name], exact[name]) for name in inputs)


@pytest.mark.parametrize("mode", CONV_MODES)
def test_only_what_is_asked_for_is_made_and_lies_as_the_compiler_expects(mode):
    """A compiled graph reads gradients by the strides that register_fake promises."""
    inputs, padding = conv_inputs(**CONV_MODES[mode])
    x, weight, bias = inputs["x"], inputs["weight"], inputs.get("bias")
    d_y = torch.randn(x.shape)
    whole = fused.backward(d_y, x, weight, bias, **padding)
    for t, gradient in zip((x, weight, bias), whole, strict=True):
        assert (gradient is None) == (t is None)
        if t is not None:
            assert gradient.shape == t.shape and gradient.is_contiguous()
    for of_x, of_taps in ((True, False), (False, True)):
        found = fused.backward(d_y, x, weight, bias, **padding, of_x=of_x, of_taps=of_taps)
        for gradient, other, asked in zip(found, whole, (of_x, of_taps, of_taps), strict=True):
            assert torch.equal(gradient, other) if asked and other is not None else gradient is None


def leaves_of(**options):
    inputs, padding = conv_inputs(bias=True, **options)
    return {name: t.detach().requires_grad_() for name, t in inputs.items()}, padding


def test_by_name_only_on_a_cpu_and_only_the_inputs_are_saved():
    leaves, padding = leaves_of()
    assert "Fused" not in type(depthwise_conv_silu(**leaves, **padding).grad_fn).__name__
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = depthwise_conv_silu(**leaves, **padding, impl="triton")
    assert "Fused" in type(y.grad_fn).__name__
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in leaves.values()}


def test_an_expanded_incoming_gradient_one_gradient_and_checkpointing():
    leaves, padding = leaves_of()
    y = depthwise_conv_silu(**leaves, **padding, impl="triton")
    (of_sum,) = torch.autograd.grad(y.sum(), leaves["weight"], retain_graph=True)
    whole = torch.ones_like(y)
    assert torch.equal(of_sum, torch.autograd.grad(y, leaves["weight"], whole)[0])
    y = checkpoint(
        lambda: depthwise_conv_silu(**leaves, **padding, impl="triton"), use_reentrant=False
    )
    assert torch.equal(of_sum, torch.autograd.grad(y.sum(), leaves["weight"])[0])


def test_second_and_many_gradients_are_the_portable_forms():
    results = []
    for impl in ("triton", "portable"):
        leaves, padding = leaves_of()
        inputs = list(leaves.values())
        y = depthwise_conv_silu(**leaves, **padding, impl=impl)
        results.append(every_gradient(y, inputs, leaves["x"]))
    assert_close(*results, 10 * SAME)


@not_taken
def test_what_the_kernels_do_not_take_is_named(dtype, message):
    inputs, padding = conv_inputs(dtype=dtype)
    with pytest.raises(ValueError, match=message):
        depthwise_conv_silu(**inputs, **padding, impl="triton")


def test_more_taps_and_an_old_triton_are_left_to_the_library(monkeypatch):
    inputs, padding = conv_inputs(taps=(3, 4))
    message = r"'triton' does not take 3 x 4 taps, more than 9; accepted: auto, portable"
    with pytest.raises(ValueError, match=message):
        depthwise_conv_silu(**inputs, **padding, impl="triton")
    monkeypatch.setattr(api, "carries_tuples", lambda: False)
    inputs, padding = conv_inputs()
    with pytest.raises(ValueError, match=r"does not take its tuples before Triton 3\.3"):
        depthwise_conv_silu(**inputs, **padding, impl="triton")
    # As on a GPU, where "auto" is "triton"
    monkeypatch.setattr(api, "implementations", lambda *_: ("triton", "portable"))
    expected = depthwise_conv_silu(**inputs, **padding, impl="portable")
    assert torch.equal(depthwise_conv_silu(**inputs, **padding), expected)


@one_node
# torch's own, inside Inductor.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("mode", CONV_MODES)
def test_the_compiled_node_runs_the_same_kernels(mode, monkeypatch):
    """As on a GPU, forward and backward."""
    monkeypatch.setattr(library, "wanted", lambda device: True)
    monkeypatch.setattr(library, "takes_kernels", lambda x: True)
    inputs, padding = conv_inputs(**CONV_MODES[mode])
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    # Inductor reads a gradient by the strides that it expects, aot_eager by those that it has.
    backend = "inductor" if mode == "3x3, bias" else "aot_eager"

    def plain(t, impl="auto"):
        return depthwise_conv_silu(**t, **padding, impl=impl)

    results = []
    for form in (
        torch.compile(plain, fullgraph=True, backend=backend),
        lambda t: plain(t, "triton"),
    ):
        y = form(leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

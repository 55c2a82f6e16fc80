"""The selective scan's kernels in Triton's interpreter, on the CPU: `make test-kernels`."""

import pytest
import torch

from metala_vision.kernels._fused import interpreted
from metala_vision.kernels.selective_scan import selective_scan
from tests._numerics import SAME, bound, relative_rms
from tests.kernels._cases import SCAN_MODES, STEP_GATES, scan_errors, scan_inputs
from tests.kernels._common import INTERPRETER, assert_close, every_gradient

if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from metala_vision.kernels.selective_scan import api, triton_fwd
from metala_vision.kernels.selective_scan.eager import portable
from metala_vision.kernels.selective_scan.fused import Fused
from metala_vision.layers import MambaMixer
from metala_vision.layers.conv import CONVS

pytestmark = [*INTERPRETER, pytest.mark.usefixtures("poisoned")]
RULE = bound(torch.float32, "y")


@pytest.mark.parametrize("gates", STEP_GATES)
@pytest.mark.parametrize("N", [1, 4, 9])
def test_every_gate_set_meets_the_rule(N, gates):
    measured = scan_errors(N, gates, B=1, direction="forward")
    assert max(measured.values()) <= RULE, measured


@pytest.mark.parametrize("mode", SCAN_MODES)
def test_every_mode_meets_the_rule_in_one_segment_and_in_several(mode, monkeypatch):
    measured = scan_errors(7, B=1, **SCAN_MODES[mode])
    assert max(measured.values()) <= RULE, measured
    monkeypatch.setattr(triton_fwd, "TILES_OF_A_SEGMENT", 1)
    measured = scan_errors(10, B=1, **SCAN_MODES[mode])
    assert max(measured.values()) <= RULE, measured


@pytest.mark.parametrize(("E", "M"), [(1, 1), (33, 16), (9, 64)])
def test_every_width_meets_the_rule(E, M):
    measured = scan_errors(6, B=2, E=E, M=M)
    assert max(measured.values()) <= RULE, measured


@pytest.mark.slow
@pytest.mark.parametrize("gates", STEP_GATES)
@pytest.mark.parametrize("N", [17, 64, 515])
@pytest.mark.parametrize("mode", SCAN_MODES)
def test_everything_meets_the_rule(mode, N, gates):
    measured = scan_errors(N, gates, B=1, E=3, **SCAN_MODES[mode])
    assert max(measured.values()) <= RULE, measured


def leaves(N=9):
    return {name: x.requires_grad_() for name, x in scan_inputs(N, B=1).items()}


def test_by_name_only_on_a_cpu_and_every_run_gives_the_same_bits():
    inputs = leaves()
    assert "Selective" in _makers(selective_scan(**inputs))
    y = selective_scan(**inputs, impl="triton")
    assert "Fused" in _makers(y)
    gradients = torch.autograd.grad(y.sum(), list(inputs.values()))  # of an expanded one
    portable = torch.autograd.grad(selective_scan(**inputs).sum(), list(inputs.values()))
    for x, z in zip(gradients, portable, strict=True):
        assert relative_rms(x, z) <= SAME
    again = selective_scan(**inputs, impl="triton")
    assert torch.equal(y, again)
    for x, z in zip(
        gradients, torch.autograd.grad(again.sum(), list(inputs.values())), strict=True
    ):
        assert torch.equal(x, z)


def _makers(y):
    """Names of the functions behind a sum over directions."""
    return " ".join(type(f).__name__ for f, _ in y.grad_fn.next_functions)


def test_second_and_many_gradients_are_the_portable_forms():
    results = []
    for impl in ("triton", "chunked"):
        inputs = leaves(5)
        # one input made of another
        y = selective_scan(**{**inputs, "k": inputs["q"].tanh()}, impl=impl)
        given = [inputs[name] for name in ("u", "delta", "A", "q")]
        results.append(every_gradient(y, given, given[0]))
    assert_close(*results, 10 * SAME)


def test_channels_may_lie_anywhere_for_a_layer():
    """Behind a convolution over tokens they are the dimension that changes slowest."""
    inputs = {name: x.detach() for name, x in leaves().items()}
    for name in ("u", "delta", "k", "q"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert inputs[name].stride(2) != 1
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    of_one = {n: x[None] for n, x in inputs.items()}
    y = Fused.apply(*of_one.values(), "forward", None)
    expected = portable(*of_one.values(), "forward", None)
    assert relative_rms(y.detach(), expected.detach()) <= SAME
    for x, z in zip(
        torch.autograd.grad(y.square().sum(), list(inputs.values())),
        torch.autograd.grad(expected.square().sum(), list(inputs.values())), strict=True,
    ):  # fmt: skip
        assert relative_rms(x, z) <= 10 * SAME


@pytest.mark.parametrize("options", [{"direction": "forward"}, {"shared_parameters": True}, {}])
@pytest.mark.parametrize("conv", CONVS)
def test_a_mixer_through_the_kernels_is_the_mixer(conv, options, monkeypatch):
    torch.manual_seed(0)
    mixer, x = MambaMixer(16, conv=conv, d_state=4, **options), torch.randn(2, 2, 3, 16)
    expected = mixer(x)
    monkeypatch.setattr(api, "_run", lambda *call: Fused.apply(*call[:9]))
    assert relative_rms(mixer(x).detach(), expected.detach()) <= 10 * SAME


def test_a_step_given_in_float64_is_taken_in_float32():
    inputs = {name: x.detach() for name, x in leaves().items()}
    inputs["delta"] = inputs["delta"].double()
    y, expected = (selective_scan(**inputs, impl=impl) for impl in ("triton", "reference"))
    assert relative_rms(y, expected) <= SAME


def test_what_the_kernels_do_not_take_is_named():
    inputs = {name: x.detach().double() for name, x in leaves().items()}
    with pytest.raises(ValueError, match="impl='triton' does not take float64; accepted: auto"):
        selective_scan(**inputs, impl="triton")

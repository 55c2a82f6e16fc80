"""The linear recurrence's kernels in Triton's interpreter, on the CPU: `make test-kernels`."""

import pytest
import torch

from metala_vision.kernels._fused import interpreted
from metala_vision.kernels.linear_recurrence import linear_recurrence
from tests._numerics import GATES, SAME, bound, normal, relative_rms
from tests.kernels._cases import RECURRENCE_MODES, recurrence_errors
from tests.kernels._common import INTERPRETER, assert_close, every_gradient

if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

from metala_vision.kernels.linear_recurrence import triton_scan

pytestmark = [*INTERPRETER, pytest.mark.usefixtures("poisoned")]
RULE = bound(torch.float32, "h")


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("N", [1, 2, 31, 32, 33])
def test_every_gate_set_meets_the_rule(N, gates):
    measured = recurrence_errors(N, gates, B=1)
    assert max(measured.values()) <= RULE, measured


@pytest.mark.parametrize("mode", RECURRENCE_MODES)
def test_every_mode_meets_the_rule_in_one_segment_and_in_several(mode, monkeypatch):
    options = {"B": 1, "C": 20, **RECURRENCE_MODES[mode]}
    measured = recurrence_errors(40, **options)
    assert max(measured.values()) <= RULE, measured
    monkeypatch.setattr(triton_scan, "LONGEST_SEGMENT", 32)
    measured = recurrence_errors(100, **options)
    assert max(measured.values()) <= RULE, measured


@pytest.mark.parametrize(("M", "C"), [(1, 1), (3, 16), (1, 70), (2, 129)])
def test_every_width_meets_the_rule(M, C):
    measured = recurrence_errors(35, B=1, M=M, C=C)
    assert max(measured.values()) <= RULE, measured


@pytest.mark.slow
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("N", [64, 196, 513])
@pytest.mark.parametrize("mode", RECURRENCE_MODES)
def test_everything_meets_the_rule(mode, N, gates):
    measured = recurrence_errors(N, gates, **RECURRENCE_MODES[mode])
    assert max(measured.values()) <= RULE, measured


def leaves(N=20):
    b, log_decay = normal(1, N, 2, 5, seed=0).float(), -normal(1, N, 5, seed=1).abs().float()
    return [b.requires_grad_(), log_decay.requires_grad_()]


def test_by_name_only_on_a_cpu_and_every_run_gives_the_same_bits():
    b, log_decay = leaves()
    assert "Fused" not in type(linear_recurrence(b, log_decay).grad_fn).__name__
    h = linear_recurrence(b, log_decay, impl="triton")
    gradients = torch.autograd.grad(h.sum(), (b, log_decay))  # of an expanded one
    portable = torch.autograd.grad(linear_recurrence(b, log_decay).sum(), (b, log_decay))
    for x, y in zip(gradients, portable, strict=True):
        assert relative_rms(x, y) <= SAME
    again = linear_recurrence(b, log_decay, impl="triton")
    assert torch.equal(h, again)
    for x, y in zip(gradients, torch.autograd.grad(again.sum(), (b, log_decay)), strict=True):
        assert torch.equal(x, y)


def test_second_and_many_gradients_are_the_portable_forms():
    results = []
    for impl in ("triton", "chunked"):
        b, log_decay = leaves()
        h = linear_recurrence(b, log_decay.exp() - 1, impl=impl)
        results.append(every_gradient(h, (b, log_decay), b))
    assert_close(*results, 10 * SAME)


def test_what_the_kernels_do_not_take_is_named():
    b, log_decay = leaves()
    with pytest.raises(ValueError, match="impl='triton' does not take float64; accepted: auto"):
        linear_recurrence(b.double(), log_decay, impl="triton")

"""What the kernels give as nodes lies in memory as the nodes promise: `make test-kernels`.

A compiled graph reads a tensor by the strides that register_fake gives it, and from an address that
16 bytes divide: an allocation's begin. torch.library.opcheck compares neither.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from metala_vision.kernels import (
    depthwise_conv,
    gated_linear_attention,
    gated_norm,
    linear_recurrence,
    selective_scan,
)
from metala_vision.kernels._fused import interpreted
from tests._numerics import normal
from tests.kernels._cases import CONV_MODES, NORM_MODES, conv_inputs, norm_inputs, scan_inputs
from tests.kernels._common import INTERPRETER

if not interpreted():
    pytest.skip("needs TRITON_INTERPRET=1: make test-kernels", allow_module_level=True)

pytestmark = INTERPRETER
N, H, K, V = 20, 2, 16, 24


def attention_case(per_direction, key, decay, order):
    projected = normal(2, N, H * (3 * K + V), seed=0, dtype=torch.float32)
    q, k, gate, v = (
        x.unflatten(2, (H, -1)) for x in projected.split([H * K, H * K, H * K, H * V], 2)
    )
    if per_direction:
        gate = torch.stack([gate, -gate])
    visits = torch.randperm(N).int() if order else None
    given = {"gate": gate if decay == "gate" else None, "log": -gate.abs()}
    log_decay = given["log"] if decay == "log" else None
    return (
        q, v, k if key else None, given["gate"], log_decay, 16.0, 0.25, "bidirectional", visits,
    )  # fmt: skip


def norm_case(mode):
    options = dict(NORM_MODES[mode])
    norm = options.pop("norm", "layer")
    given = norm_inputs(N, **options)
    names = ("o", "output_gate", "bias", "q", "k", "gate", "v", "w_aug")
    return *(given.get(name) for name in names), 16.0, norm, 1e-5


def conv_case(mode):
    inputs, padding = conv_inputs(**CONV_MODES[mode])
    return inputs["x"], inputs["weight"], inputs.get("bias"), *padding.values()


def recurrence_case(direction, per_direction):
    lead = [2] if per_direction else []
    b = normal(*lead, 2, N, 3, 5, seed=0, dtype=torch.float32)[..., :2, :]
    return b, -normal(2, N, 5, seed=1, dtype=torch.float32).abs(), direction, None


def scan_case(leave_out):
    own = ("u", "delta", "A", "k", "q", "skip", "delta_bias")
    given = scan_inputs(N, own=own, leave_out=leave_out)
    return *(given.get(name) for name in own), "bidirectional", None


CASES = {
    "attention": (gated_linear_attention, lambda: attention_case(False, False, "gate", False)),
    "attention, order": (gated_linear_attention, lambda: attention_case(False, True, "gate", True)),
    "attention, two decays": (
        gated_linear_attention,
        lambda: attention_case(True, True, "gate", False),
    ),
    "attention, log": (gated_linear_attention, lambda: attention_case(False, True, "log", False)),
    **{f"norm, {m}": (gated_norm, lambda m=m: norm_case(m)) for m in NORM_MODES},
    **{f"convolution, {m}": (depthwise_conv, lambda m=m: conv_case(m)) for m in CONV_MODES},
    "recurrence": (linear_recurrence, lambda: recurrence_case("backward", False)),
    "recurrence, two": (linear_recurrence, lambda: recurrence_case("bidirectional", True)),
    "scan": (selective_scan, lambda: scan_case(())),
    "scan, plain": (selective_scan, lambda: scan_case(("skip", "delta_bias"))),
}
OPERATORS = {depthwise_conv: "depthwise_conv_silu"}


def layout(tensors):
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    return [(x.dtype, tuple(x.shape), x.stride(), x.storage_offset()) for x in tensors]


@pytest.mark.parametrize("name", CASES)
def test_strides_are_those_promised(name, monkeypatch):
    package, make = CASES[name]
    monkeypatch.setattr(f"{package.__name__}.library.takes_kernels", lambda x: True)
    operator = OPERATORS.get(package, package.__name__.rpartition(".")[2])
    forward = getattr(torch.ops.metala_vision, operator)
    backward = getattr(torch.ops.metala_vision, f"{operator}_backward")
    arguments = make()
    out = forward(*arguments)
    # The recurrence's takes its states too, the convolution's what is asked for.
    more = (out,) if package is linear_recurrence else ()
    asked = (True, True) if package is depthwise_conv else ()
    d_out = torch.ones(2 * out.shape[-1])[: out.shape[-1]].expand(out.shape)
    gradients = backward(d_out, *more, *arguments, *asked)
    with FakeTensorMode() as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, (d_out, more, arguments))
        assert layout(out) == layout(forward(*fake[2]))
        assert layout(gradients) == layout(backward(fake[0], *fake[1], *fake[2], *asked))

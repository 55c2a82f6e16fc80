"""The depthwise convolution with SiLU: the portable form against the definition, wrong calls."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from metala_vision.kernels.depthwise_conv import depthwise_conv_silu, depthwise_conv_silu_op
from tests._numerics import SAME, bound, normal, relative_rms
from tests.kernels._cases import CONV_MODES, conv_errors, conv_inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", CONV_MODES)
def test_the_portable_form_meets_the_rule(mode, dtype):
    measured = conv_errors(impl="portable", working_dtype=dtype, **CONV_MODES[mode])
    for name, error in measured.items():
        # Roundings of z and of silu's result in 16 bits, both below 2^-9 of it, at random
        limit = 1e-14 if dtype == torch.float64 else bound(dtype, name)
        assert error <= limit, (name, error)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_taps_and_padding_meet_the_rule(data):
    taps = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    top, left = (data.draw(st.integers(0, n - 1)) for n in taps)
    grid = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 6)))
    x, weight = normal(2, *grid, 3, seed=0), normal(3, *taps, seed=1)
    exact, found = (
        depthwise_conv_silu(x, weight, top=top, left=left, impl=impl)
        for impl in ("reference", "portable")
    )
    assert relative_rms(found, exact) <= 1e-14


def test_the_definition_is_torchs_convolution():
    inputs, padding = conv_inputs(dtype=torch.float64, bias=True)
    maps = inputs["x"].permute(0, 3, 1, 2)
    weight = inputs["weight"].unsqueeze(1)
    z = F.conv2d(maps, weight, inputs["bias"], padding=1, groups=len(weight))
    exact = depthwise_conv_silu(**inputs, **padding, impl="reference")
    assert relative_rms(F.silu(z).permute(0, 2, 3, 1), exact) <= 1e-14


@pytest.mark.parametrize("mode", CONV_MODES)
def test_gradcheck(mode):
    inputs, padding = conv_inputs((2, 3), C=2, dtype=torch.float64, **CONV_MODES[mode])
    names = list(inputs)
    tensors = [t.requires_grad_() for t in inputs.values()]
    for impl in ("portable", "reference"):
        assert torch.autograd.gradcheck(
            lambda *t, impl=impl: depthwise_conv_silu(
                **dict(zip(names, t, strict=True)), **padding, impl=impl
            ),
            tensors,
        )


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("mode", CONV_MODES)
def test_a_script_gives_the_same_bits(mode):
    inputs, padding = conv_inputs(**CONV_MODES[mode])
    arguments = (inputs["x"], inputs["weight"], inputs.get("bias"), *padding.values())
    scripted = torch.jit.script(depthwise_conv_silu_op)
    assert torch.equal(scripted(*arguments), depthwise_conv_silu_op(*arguments))


def test_under_autocast_both_forms_give_its_dtype():
    inputs, padding = conv_inputs(bias=True)
    exact = depthwise_conv_silu(**inputs, **padding, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        for impl in ("auto", "reference"):
            y = depthwise_conv_silu(**inputs, **padding, impl=impl)
            assert y.dtype == torch.bfloat16
            assert relative_rms(y, exact) <= bound(torch.bfloat16, "y")


def test_one_tap_is_a_product():
    x, weight = normal(2, 3, 4, 5, seed=0), normal(5, 1, 1, seed=1)
    y = depthwise_conv_silu(x, weight)
    assert relative_rms(y, F.silu(x * weight[:, 0, 0])) <= SAME


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 3, 20)}, r"x must be \[B, Gh, Gw, C\].*got shape \[2, 3, 20\]"),
        ({"x": torch.zeros(2, 0, 3, 20)}, r"no dimension 0, got shape \[2, 0, 3, 20\]"),
        ({"weight": torch.zeros(19, 3, 3)}, r"weight must be .* C=20, got shape \[19, 3, 3\]"),
        ({"weight": torch.zeros(20, 1, 3, 3)}, r"got shape \[20, 1, 3, 3\]"),
        ({"bias": torch.zeros(19)}, r"bias must have shape \[20\], got \[19\]"),
        ({"top": 3}, "top must be 0 to 2 for 3 taps, got 3"),
        ({"left": -1}, "left must be 0 to 2 for 3 taps, got -1"),
        ({"bias": torch.zeros(20, device="meta")}, "bias is on meta, x on cpu"),
        ({"weight": torch.zeros(20, 3, 3).int()}, r"weight has dtype torch\.int32; accepted"),
        ({"weight": torch.zeros(20, 3, 3).half()}, r"weight has dtype torch\.float16, x torch\."),
        ({"impl": "triton"}, "impl='triton' is not available here; accepted: auto, portable"),
        ({"impl": "chunked"}, "impl='chunked' is not available here"),
    ],
)
def test_a_wrong_call_names_the_value(changes, message):
    inputs, padding = conv_inputs()
    with pytest.raises(ValueError, match=message):
        depthwise_conv_silu(**{**inputs, **padding, **changes})


def test_within_vmap_autocast_reaches_no_convolution_and_the_call_works():
    inputs, padding = conv_inputs()
    weight, bias = inputs["weight"], inputs.get("bias")

    def call(x):
        return depthwise_conv_silu_op(x, weight, bias, *padding.values())

    xs = torch.stack([inputs["x"], -inputs["x"]])
    with torch.autocast("cpu", torch.bfloat16):
        mapped = torch.func.vmap(call)(xs)
    assert mapped.dtype == torch.float32
    assert relative_rms(mapped, torch.stack([call(x) for x in xs])) <= SAME

"""The gated norm: the portable form against the definition, and wrong calls."""

import pytest
import torch

from metala_vision.kernels.gated_norm import NORMS, gated_norm, gated_norm_op
from tests._numerics import GATES, SAME, bound, relative_rms
from tests.kernels._cases import NORM_MODES, norm_errors, norm_inputs


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("mode", NORM_MODES)
def test_the_portable_form_meets_the_rule(mode, gates):
    measured = norm_errors(21, gates, impl="portable", **NORM_MODES[mode])
    assert max(measured.values()) <= bound(torch.float32, "y"), measured


@pytest.mark.parametrize("mode", NORM_MODES)
def test_in_float64_the_portable_form_is_the_definition(mode):
    measured = norm_errors(9, "N(0,5)", impl="portable", working_dtype=torch.float64,
                           **NORM_MODES[mode])  # fmt: skip
    # 1 - alpha by subtraction in the definition loses up to 1e-14 of a key near 0
    assert max(measured.values()) <= 1e-11, measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", NORM_MODES)
def test_16_bits_meet_the_rule(mode, dtype):
    measured = norm_errors(196, impl="portable", working_dtype=dtype, K=32, V=64,
                           **{"gates": "N(0,1)", **NORM_MODES[mode]})  # fmt: skip
    for name, error in measured.items():
        assert error <= bound(dtype, name), (name, error)


def test_a_large_product_of_small_values_stays_finite_in_float16():
    given = norm_inputs(3, aug="k", K=64, dtype=torch.float16)
    given |= {"q": torch.full_like(given["q"], 60), "k": torch.full_like(given["k"], 60)}
    given |= {"w_aug": torch.ones_like(given["w_aug"]), "v": torch.zeros_like(given["v"])}
    assert torch.isfinite(gated_norm(**given)).all()


def test_what_self_augmentation_adds_is_the_papers_less_a_half():
    given = norm_inputs(5, dtype=torch.float64)
    key = 1 - torch.sigmoid(given["gate"]) ** (1 / 16)
    own = (given["q"] * given["w_aug"] * key).sum(-1, keepdim=True)
    o = given["o"] + torch.sigmoid(own * given["v"])
    raw = given["output_gate"] + given["bias"]
    x = o - o.mean(-1, keepdim=True)
    expected = x / (o.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * raw * raw.sigmoid()
    assert relative_rms(gated_norm(**given), expected) <= 1e-11


@pytest.mark.parametrize("mode", NORM_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_writes_over_nothing_of_the_callers_and_changes_no_bit(mode, dtype):
    options = dict(NORM_MODES[mode])
    norm = options.pop("norm", "layer")
    given = norm_inputs(5, dtype=dtype, **options)
    before = {name: x.clone() for name, x in given.items()}
    expected = gated_norm(**given, norm=norm)
    with torch.no_grad():
        assert torch.equal(gated_norm(**given, norm=norm), expected)
    assert all(torch.equal(x, before[name]) for name, x in given.items())


def test_gradcheck():
    given = {
        name: x.requires_grad_()
        for name, x in norm_inputs(3, K=2, V=3, B=1, dtype=torch.float64).items()
    }
    names, tensors = list(given), list(given.values())
    assert torch.autograd.gradcheck(
        lambda *x: gated_norm(**dict(zip(names, x, strict=True))), tensors
    )


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_script_gives_the_same_bits():
    given = norm_inputs(5)
    names = ("o", "output_gate", "bias", "q", "k", "gate", "v", "w_aug")
    for norm in NORMS:
        arguments = (*(given.get(name) for name in names), 16.0, norm, 1e-5)
        assert torch.equal(torch.jit.script(gated_norm_op)(*arguments), gated_norm_op(*arguments))
    plain = (given["o"], given["output_gate"], *[None] * 6, 16.0, "rms", 1e-5)
    assert torch.equal(torch.jit.script(gated_norm_op)(*plain), gated_norm_op(*plain))


def test_a_constant_channel_is_normalised_to_zero():
    o, gate = torch.full((1, 3, 2, 8), 7.0), torch.ones(1, 3, 2, 8)
    assert gated_norm(o, gate).abs().max() <= SAME
    assert relative_rms(gated_norm(o, gate, norm="rms"), torch.nn.functional.silu(gate)) <= SAME


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "norm='batch' is unknown; accepted: layer, rms"),
        ({"eps": 0}, "eps must be > 0, got 0"),
        ({"gate_divisor": -1}, "gate_divisor must be > 0, got -1"),
        ({"o": torch.zeros(2, 3, 4)}, r"o must be \[B, N, H, V\].*got shape \[2, 3, 4\]"),
        ({"o": torch.zeros(1, 0, 2, 4)}, r"no dimension 0, got shape \[1, 0, 2, 4\]"),
        ({"o": torch.zeros(1, 1, 1, 257)}, "V <= 256 is supported, got V=257"),
        ({"output_gate": torch.zeros(2, 5, 2, 4)}, r"output_gate must have .*got \[2, 5, 2, 4\]"),
        ({"bias": torch.zeros(32)}, r"bias must have shape \[2, 16\], got \[32\]"),
        ({"q": None}, "w_aug needs q, v, and k or gate"),
        ({"gate": None}, "w_aug needs q, v, and k or gate"),
        ({"q": torch.zeros(2, 5, 2, 129)}, "K <= 128, got shape"),
        ({"w_aug": torch.zeros(2, 15)}, r"w_aug must have shape \[2, 16\], got \[2, 15\]"),
        ({"w_aug": torch.zeros(2, 16).int()}, r"w_aug has dtype torch\.int32; accepted"),
        ({"v": torch.zeros(2, 5, 16, 2).transpose(2, 3)}, "v needs a contiguous last dimension"),
        ({"bias": torch.zeros(2, 16, device="meta")}, "bias is on meta, o on cpu"),
        ({"impl": "triton"}, "impl='triton' is not available here; accepted: auto, portable"),
        ({"impl": "chunked"}, "impl='chunked' is not available here"),
    ],
)
def test_a_wrong_call_names_the_value(changes, message):
    given = norm_inputs(5)
    with pytest.raises(ValueError, match=message):
        gated_norm(**{**given, **changes})

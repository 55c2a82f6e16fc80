"""The short convolution by itself; in mixers it is in test_mixers.py."""

import pytest
import torch

from metala_vision.layers.conv import TokenConv, is_plain
from tests._numerics import normal, relative_rms
from tests.layers.test_mixers import C


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_the_causal_convolution_keeps_its_width_and_is_scripted():
    x = normal(2, 1, 7, C, seed=3, dtype=torch.float32)
    plain, same, two = (TokenConv(C, kind) for kind in ("causal1d", "causal1d(4)", "causal1d(2)"))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {"conv.weight": (C, 1, 4)}
    assert two.state_dict()["conv.weight"].shape == (C, 1, 2)
    same.load_state_dict(plain.state_dict())
    assert torch.equal(same(x), plain(x))
    assert torch.equal(torch.jit.script(two)(x), two(x))
    one_token = two(x[:, :, :1])  # shorter than the kernel
    assert torch.equal(one_token, torch.nn.functional.silu(x[:, :, :1] * two.conv.weight[:, 0, 1]))
    for wrong in (
        "causal1d(0)",
        "causal1d()",
        "causal1d(2",
        "causal1d(-2)",
        "causal2d(2)",
        2,
        None,
    ):
        with pytest.raises(ValueError) as caught:
            TokenConv(C, wrong)
        assert str(caught.value) == (
            f"conv={wrong!r} is unknown; accepted: depthwise2d, causal1d, none, causal1d(WIDTH)"
        )


KINDS = {"depthwise2d": "forward", "causal1d": "forward", "causal1d(2)": "backward"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_what_the_module_gives(kind, bias):
    conv = TokenConv(C, kind, KINDS[kind], bias=bias, dtype=torch.float64)
    x = normal(2, 4, 5, C, seed=1).requires_grad_()
    assert is_plain(conv.conv)
    inputs = [x, *conv.parameters()]
    results = []
    for y in (conv(x), conv.by_module(x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, other in zip(*results, strict=True):
        assert relative_rms(ours, other) <= 1e-14


def hooked(conv):
    conv.conv.register_forward_hook(lambda module, args, out: 2 * out)


def parametrized(conv):
    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    torch.nn.utils.parametrize.register_parametrization(conv.conv, "weight", Double())


def adapted(conv):
    """As peft puts a module of its own in the convolution's place."""

    class Adapted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.weight, self.bias = inner.weight, inner.bias

        def forward(self, x):
            return 2 * self.inner(x)

    conv.conv = Adapted(conv.conv)


@pytest.mark.parametrize("change", [hooked, parametrized, adapted])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_convolutions_place_is_not_passed_by(kind, change):
    conv = TokenConv(C, kind, KINDS[kind], dtype=torch.float64)
    x = normal(1, 3, 4, C, seed=2)
    change(conv)
    after = conv(x)
    weight = 2 * conv.conv.weight if change is not parametrized else conv.conv.weight
    plain = TokenConv(C, kind, KINDS[kind], dtype=torch.float64)
    plain.load_state_dict({"conv.weight": weight.detach()})
    assert relative_rms(after, plain(x)) <= 1e-14  # SiLU(2 z)

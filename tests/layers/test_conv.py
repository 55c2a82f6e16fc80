"""The short convolution by itself; in mixers it is in test_mixers.py."""

import accelerate
import pytest
import torch
import torch.fx

import metala_vision.layers.conv as conv_layer
from metala_vision.layers.conv import TokenConv
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


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(conv_layer, "on_gpu", lambda x: True)


def conv_and_map(kind, **options):
    conv = TokenConv(C, kind, KINDS[kind], dtype=torch.float64, **options)
    return conv, normal(2, 4, 5, C, seed=1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_what_the_module_gives(kind, bias, as_on_a_gpu):
    conv, x = conv_and_map(kind, bias=bias)
    assert conv.fuses(x)
    x.requires_grad_()
    inputs = [x, *conv.parameters()]
    results = []
    for y in (conv(x), conv.by_module(x)):
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, other in zip(*results, strict=True):
        assert relative_rms(ours, other) <= 1e-14


def hooked(module):
    module.register_forward_hook(lambda module, args, out: 2 * out)


def parametrized(module):
    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    torch.nn.utils.parametrize.register_parametrization(module, "weight", Double())


def adapted(module):
    """As peft puts a module of its own in the convolution's place."""

    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight, self.bias = module, module.weight, module.bias

        def forward(self, x):
            return 2 * self.inner(x)

    return Adapted()


def with_a_forward_of_its_own(module):
    """As accelerate offloads weights."""
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def offloaded(module):
    accelerate.cpu_offload(module)


def circular(module):
    module.padding_mode = "circular"


def dilated(module):
    module.dilation = tuple(2 for _ in module.dilation)
    module.padding = tuple(2 * p for p in module.padding)


def dense(module):
    return type(module)(
        C, C, module.kernel_size, padding=module.padding, bias=False, dtype=torch.float64
    )


def wide(module):
    """Of five taps more."""
    one = len(module.kernel_size) == 1
    size = tuple(n + (0 if one else 2) for n in module.kernel_size)
    padding = tuple(p + (0 if one else 1) for p in module.padding)
    return type(module)(C, C, size, padding=padding, groups=C // 2, bias=False, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [hooked, parametrized, adapted, with_a_forward_of_its_own, offloaded, circular, dilated, dense,
     wide],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_convolutions_place_is_not_passed_by(kind, change, as_on_a_gpu):
    conv, x = conv_and_map(kind)
    plain = conv(x)
    conv.conv = change(conv.conv) or conv.conv
    assert not conv.fuses(x)
    if change is dilated and kind != "depthwise2d":
        return  # fewer tokens come out than went in: the module itself does not fit
    assert torch.equal(conv(x), conv.by_module(x))
    same = change is offloaded or (change is circular and kind != "depthwise2d")
    assert torch.equal(conv(x), plain) == same


def test_a_global_hook_is_not_passed_by(as_on_a_gpu):
    conv, x = conv_and_map("depthwise2d")
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    try:
        conv(x)
    finally:
        handle.remove()
    assert seen == [conv.conv, conv] and conv.fuses(x)


def test_on_a_cpu_in_exports_and_for_tracers_it_is_a_module():
    conv, x = conv_and_map("depthwise2d")
    assert not conv.fuses(x)
    graph = torch.fx.symbolic_trace(conv)
    assert torch.equal(graph(x), conv(x))
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["conv"]
    exported = torch.export.export(conv, (x,))
    assert "squeeze" not in str(exported.graph)


def test_tracers_see_the_module_for_a_gpu_too(as_on_a_gpu):
    conv, x = conv_and_map("causal1d")
    graph = torch.fx.symbolic_trace(conv)
    assert torch.equal(graph(x), conv.by_module(x))

"""The Triton kernels on a GPU, every configuration: `make test-gpu`."""

import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from torch.nn.parallel import DistributedDataParallel

import metala_vision  # noqa: F401
from metala_vision.kernels.depthwise_conv import depthwise_conv_silu
from metala_vision.kernels.gated_linear_attention import (
    DIRECTIONS,
    fused,
    gated_linear_attention,
    gated_linear_attention_op,
)
from metala_vision.kernels.gated_norm import gated_norm
from metala_vision.kernels.linear_recurrence import linear_recurrence
from metala_vision.kernels.selective_scan import selective_scan
from metala_vision.layers import MambaMixer
from metala_vision.layers.conv import CONVS
from tests._numerics import GATES, LENGTHS, bound, normal, relative_rms
from tests.kernels._cases import (
    CONV_MODES,
    MODES,
    NORM_MODES,
    RECURRENCE_MODES,
    SCAN_MODES,
    STEP_GATES,
    TAU,
    conv_errors,
    conv_inputs,
    inputs,
    mode_errors,
    norm_errors,
    norm_inputs,
    recurrence_errors,
    scan_errors,
    scan_inputs,
    truth,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # of torch.compile, and of devices not yet seen
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(q, v, gate, d_o, direction):
    """o and gradients by the kernels, on the GPU."""
    given = [x.requires_grad_() for x in (q, v, gate)]
    o = gated_linear_attention(
        q, v, gate=gate, gate_divisor=TAU, direction=direction, impl="triton"
    )
    gradients = torch.autograd.grad(o, given, d_o)
    return {"o": o.detach(), **dict(zip(("q", "v", "gate"), gradients, strict=True))}


def assert_rule(N, gates, direction, dtype, limit=None, **shape):
    tensors = [x.cuda() for x in inputs(N, gates, dtype=dtype, **shape)]
    ours = run(*(x.to(dtype) for x in tensors), direction)
    for name, exact in truth(*tensors, direction).items():
        error = relative_rms(ours[name], exact)
        assert error <= (limit or bound(dtype, name)), (name, error)


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("N", LENGTHS)
def test_the_error_rule(N, gates, direction, dtype):
    assert_rule(N, gates, direction, dtype, B=2, H=3, V=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [17, 300])
@pytest.mark.parametrize(("K", "V"), [(1, 1), (16, 16), (32, 128), (33, 65), (64, 128), (128, 256)])
def test_every_width(K, V, N, dtype):
    assert_rule(N, "half-100-half+8", "bidirectional", dtype, B=2, H=2, K=K, V=V)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 49, 300])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode, gates, N, dtype):
    measured = mode_errors(N, gates, device="cuda", working_dtype=dtype, B=2, **MODES[mode])
    for name, error in measured.items():
        assert error <= bound(dtype, "gate" if name == "log_decay" else name), (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.parametrize("gates", STEP_GATES)
@pytest.mark.parametrize("mode", SCAN_MODES)
def test_the_selective_scan(mode, gates, N, dtype):
    measured = scan_errors(
        N, gates, device="cuda", working_dtype=dtype, E=70, M=16, **SCAN_MODES[mode]
    )
    for name, error in measured.items():
        assert error <= bound(dtype, "gate" if name == "delta" else name), (name, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("E", "M"), [(1, 1), (33, 5), (384, 16), (64, 64)])
def test_every_width_of_the_selective_scan(E, M, dtype):
    measured = scan_errors(300, device="cuda", working_dtype=dtype, E=E, M=M)
    for name, error in measured.items():
        assert error <= bound(dtype, "gate" if name == "delta" else name), (name, error)


@pytest.mark.parametrize("options", [{"direction": "forward"}, {"shared_parameters": True}, {}])
@pytest.mark.parametrize("conv", CONVS)
def test_a_mamba_mixer_agrees_with_the_cpu(conv, options, monkeypatch):
    """Whatever layout a convolution gives its result."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for cudnn in (True, False):
        mixer, x = MambaMixer(64, conv=conv, **options), torch.randn(2, 7, 9, 64)
        expected = mixer(x)
        with torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=False):
            assert relative_rms(mixer.cuda()(x.cuda()).detach().cpu(), expected.detach()) <= 1e-4


RECURRENCES = {
    "linear_recurrence": (
        linear_recurrence,
        lambda: {
            "b": normal(2, 3, 600, 2, 70, seed=0).cuda().bfloat16(),
            "log_decay": -normal(3, 600, 70, seed=1).abs().float().cuda(),
        },
    ),
    "selective_scan": (
        selective_scan,
        lambda: scan_inputs(600, B=3, E=70, M=16, device="cuda", dtype=torch.bfloat16),
    ),
}


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_recurrence_eager_compiled_in_a_cuda_graph_and_every_time(name):
    operator, make = RECURRENCES[name]
    given = make()
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    y = operator(**leaves)
    first = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    for _ in range(5):
        y = operator(**leaves)
        again = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    compiled = torch.compile(lambda x: operator(**x), fullgraph=True)(leaves)
    assert relative_rms(compiled.detach(), y.detach()) <= bound(torch.bfloat16, "y")
    found = torch.autograd.grad(compiled, list(leaves.values()), torch.ones_like(y))
    for ours, eager in zip(found, first, strict=True):
        assert relative_rms(ours, eager) <= bound(torch.bfloat16, "gate")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        operator(**given)  # compiles
        with torch.cuda.graph(graph):
            captured = operator(**given)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, y.detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "V"), [(1, 2), (16, 16), (32, 64), (33, 65), (64, 128), (128, 256)])
@pytest.mark.parametrize("N", [1, 196, 4097])
# Of other sets, most gradients are below float16's range.
@pytest.mark.parametrize("gates", ["N(0,1)", "half-100-half+8"])
@pytest.mark.parametrize("mode", NORM_MODES)
def test_the_gated_norm(mode, gates, N, K, V, dtype):
    measured = norm_errors(
        N, gates, device="cuda", working_dtype=dtype, K=K, V=V, **NORM_MODES[mode]
    )
    for name, error in measured.items():
        assert error <= bound(dtype, name), (name, error)


def test_the_gated_norm_eager_compiled_in_a_cuda_graph_and_every_time():
    given = norm_inputs(196, dtype=torch.bfloat16, device="cuda", K=32, V=64)
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    y = gated_norm(**leaves)
    assert "Fused" in type(y.grad_fn).__name__
    first = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    for _ in range(5):
        y = gated_norm(**leaves)
        again = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    compiled = torch.compile(lambda x: gated_norm(**x), fullgraph=True)(leaves)
    found = torch.autograd.grad(compiled, list(leaves.values()), torch.ones_like(y))
    one_node = hasattr(torch.compiler, "_is_exporting_flag")  # from torch 2.7 on: the same kernels
    for ours, eager in zip((compiled, *found), (y, *first), strict=True):
        limit = 0.0 if one_node else bound(torch.bfloat16, "y")
        assert relative_rms(ours.detach(), eager.detach()) <= limit
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gated_norm(**given)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, y.detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("grid", "C"),
    [((1, 1), 192), ((14, 14), 1), ((14, 14), 192), ((33, 61), 40), ((128, 128), 384)],
)
@pytest.mark.parametrize("mode", CONV_MODES)
def test_the_depthwise_convolution(mode, grid, C, dtype):
    measured = conv_errors(grid, B=3, C=C, device="cuda", working_dtype=dtype, **CONV_MODES[mode])
    for name, error in measured.items():
        assert error <= bound(dtype, name), (name, error)


def test_the_convolution_of_many_samples_is_that_of_each():
    """So many that programs take several tiles."""
    inputs, padding = conv_inputs((14, 14), B=300, C=192, dtype=torch.bfloat16, device="cuda")
    many, one = (
        conv_gradients({**inputs, "x": x}, padding) for x in (inputs["x"], inputs["x"][-1:])
    )
    assert torch.equal(many[0][-1:], one[0]) and torch.equal(many[1][-1:], one[1])


def conv_gradients(inputs, padding, form=depthwise_conv_silu):
    """y, and the gradients of its sum of squares."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = form(**leaves, **padding)
    found = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
    return [y.detach(), *found]


@pytest.mark.parametrize("mode", ["3x3, bias", "causal"])
def test_the_convolution_eager_compiled_under_autocast_in_a_cuda_graph_and_every_time(mode):
    inputs, padding = conv_inputs(
        (14, 14), C=192, dtype=torch.bfloat16, device="cuda", **CONV_MODES[mode]
    )
    leaf = inputs["x"].detach().requires_grad_()
    assert "Fused" in type(depthwise_conv_silu(**{**inputs, "x": leaf}, **padding).grad_fn).__name__
    first = conv_gradients(inputs, padding)
    compiled = torch.compile(depthwise_conv_silu, fullgraph=True)
    one_node = hasattr(torch.compiler, "_is_exporting_flag")  # from torch 2.7 on: the same kernels
    for form in (depthwise_conv_silu, compiled):
        limit = bound(torch.bfloat16, "y") if form is compiled and not one_node else 0.0
        for ours, other in zip(conv_gradients(inputs, padding, form), first, strict=True):
            assert relative_rms(ours, other) <= limit
    wide = {name: t.float() for name, t in inputs.items()}
    with torch.autocast("cuda", torch.bfloat16):
        under = conv_gradients(wide, padding)
    assert under[0].dtype == torch.bfloat16 and under[1].dtype == torch.float32
    assert torch.equal(under[0], first[0])
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = depthwise_conv_silu(**inputs, **padding)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, first[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", LENGTHS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("mode", RECURRENCE_MODES)
def test_the_linear_recurrence(mode, gates, N, dtype):
    measured = recurrence_errors(
        N, gates, device="cuda", working_dtype=dtype, C=70, **RECURRENCE_MODES[mode]
    )
    for name, error in measured.items():
        assert error <= bound(dtype, "gate" if name == "log_decay" else name), (name, error)


@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 64), (64, 128), (128, 256)])
@pytest.mark.parametrize("N", [49, 300])
def test_tf32(K, V, N, tf32):
    assert fused.precision(torch.empty(1, device="cuda")) == "tf32"
    # TF32 rounds operands to 2^-11, finer than bfloat16.
    assert_rule(N, "N(0,5)", "bidirectional", torch.float32, limit=5e-3, K=K, V=V)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_run_gives_the_same_bits_and_a_sample_alone_too(dtype):
    tensors = [x.cuda().to(dtype) for x in inputs(300, B=8, H=3, V=64)]
    first = run(*tensors, "bidirectional")
    for _ in range(5):
        again = run(*tensors, "bidirectional")
        assert all(torch.equal(first[name], again[name]) for name in first)
    alone = run(*(x[3:4] for x in tensors), "bidirectional")
    assert all(torch.equal(first[name][3:4], alone[name]) for name in first)


def test_more_programs_than_a_grids_second_dimension():
    q, v, gate, d_o = (x.cuda().to(torch.bfloat16) for x in inputs(16, H=1, V=16))
    many = [x.expand(70_000, -1, -1, -1).contiguous() for x in (q, v, gate, d_o)]
    ours, one = run(*many, "bidirectional"), run(q, v, gate, d_o, "bidirectional")
    assert all(torch.equal(ours[name][-1:], one[name]) for name in one)


def test_compiled_it_is_one_node_with_eagers_bits():
    q, v, gate, d_o = (x.cuda().to(torch.bfloat16) for x in inputs(196, B=2, H=3, V=64))
    given = [x.requires_grad_() for x in (q, v, gate)]

    def call(q, v, gate):
        return gated_linear_attention_op(q, v, None, gate, None, TAU, 0.2, "bidirectional", None)

    o = call(*given)
    assert "Fused" in type(o.grad_fn).__name__
    plain = [o, *torch.autograd.grad(o, given, d_o)]
    o = torch.compile(call, fullgraph=True)(*given)
    for ours, other in zip([o, *torch.autograd.grad(o, given, d_o)], plain, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_trains_under_autocast_and_agrees_with_the_cpu(compiled, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = timm.create_model("metala_nano", num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model = model.cuda()
    forward = torch.compile(model, fullgraph=True) if compiled else model
    # The rule's 1e-5 for each of 8 blocks.
    assert relative_rms(forward(x.cuda()).cpu(), expected) <= 1e-4
    with torch.autocast("cuda", torch.bfloat16):
        forward(x.cuda()).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_checkpointing_and_ddp():
    torch.distributed.init_process_group(
        "nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1
    )
    try:
        plain = timm.create_model("metala_nano", num_classes=5).cuda()
        wrapped = timm.create_model("metala_nano", num_classes=5).cuda()
        wrapped.load_state_dict(plain.state_dict())
        wrapped.set_grad_checkpointing()
        x = torch.randn(2, 3, 64, 64, device="cuda")
        plain(x).square().mean().backward()
        DistributedDataParallel(wrapped, device_ids=[0])(x).square().mean().backward()
        for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
            assert relative_rms(q.grad, p.grad) <= 1e-5
    finally:
        torch.distributed.destroy_process_group()


def test_activations_saved_are_the_inputs():
    q, v, gate, _ = (x.cuda().to(torch.bfloat16) for x in inputs(196, B=32, H=3, V=64))
    given = [x.requires_grad_() for x in (q, v, gate)]
    before = torch.cuda.memory_allocated()
    o = gated_linear_attention(given[0], given[1], gate=given[2])
    kept = torch.cuda.memory_allocated() - before
    assert kept <= o.numel() * o.element_size() + 1024


def test_capture_in_a_cuda_graph():
    q, v, gate, _ = (x.cuda().to(torch.bfloat16) for x in inputs(196, B=2, H=3, V=64))
    expected = gated_linear_attention(q, v, gate=gate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gated_linear_attention(q, v, gate=gate)
    o.zero_()
    graph.replay()
    assert torch.equal(o, expected)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        pytest.skip("compute-sanitizer is not installed")
    code = (
        "import torch; from metala_vision.kernels.gated_linear_attention import *\n"
        "for N in (20, 300):\n"
        "    q, g, v = (torch.randn(1, N, 2, e).cuda().bfloat16() for e in (20, 20, 40))\n"
        "    q.requires_grad_()\n"
        "    gated_linear_attention(q, v, gate=g).sum().backward()\n"
        "from metala_vision.kernels.depthwise_conv import *\n"
        "x = torch.randn(2, 5, 7, 40).cuda().bfloat16().requires_grad_()\n"
        "w = torch.randn(40, 3, 3).cuda().bfloat16().requires_grad_()\n"
        "depthwise_conv_silu(x, w, top=1, left=1).sum().backward()\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        capture_output=True, text=True, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

"""Every shipped configuration of the Triton kernels, compiled for GPUs that need not be there.

`make test-kernels` compiles what the models need for every target and all configurations for an
H100; `make test-slow` compiles everything for every target. No register may spill to memory, and
no product may become one of Hopper's warp group instructions (kernels/README.md).
"""

import os
import re
import subprocess
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from metala_vision.kernels._fused import interpreted

if interpreted():
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metala_vision.kernels._triton import Launch
from metala_vision.kernels.depthwise_conv.triton_bwd import (
    backward_launches as conv_backward_launches,
)
from metala_vision.kernels.depthwise_conv.triton_fwd import Call as ConvCall
from metala_vision.kernels.depthwise_conv.triton_fwd import output_launch
from metala_vision.kernels.gated_linear_attention.triton_bwd import backward_launches
from metala_vision.kernels.gated_linear_attention.triton_fwd import forward_launches
from metala_vision.kernels.gated_linear_attention.triton_states import Call, padded
from metala_vision.kernels.gated_norm.triton_bwd import backward_launch
from metala_vision.kernels.gated_norm.triton_fwd import Call as NormCall
from metala_vision.kernels.gated_norm.triton_fwd import forward_launch
from metala_vision.kernels.linear_recurrence import triton_scan
from metala_vision.kernels.linear_recurrence.fused import Edges
from metala_vision.kernels.selective_scan.triton_bwd import (
    backward_launches as scan_backward_launches,
)
from metala_vision.kernels.selective_scan.triton_fwd import Call as ScanCall
from metala_vision.kernels.selective_scan.triton_fwd import (
    forward_launches as scan_forward_launches,
)
from tests.kernels._cases import CONV_MODES, NORM_MODES, conv_inputs, norm_inputs

pytestmark = pytest.mark.aot

CUDA = {f"sm_{c}": GPUTarget("cuda", c, 32) for c in (80, 89, 90, 100, 120)}
TARGETS = {**CUDA, "gfx942": GPUTarget("hip", "gfx942", 64)}
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
DOTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "ieee": torch.float32, "tf32": torch.float32}
# Widths that differ in tiles: one of 16, one of each, several of V, several of both.
WIDTHS = ((16, 16), (32, 64), (32, 128), (64, 128), (128, 256))
# (kernel, DOT) that may spill so many bytes: ptxas settles for 128 or 168 registers of 255, or with
# TF32's operands of twice bfloat16's size and several tiles of K, just misses 255.
MAY_SPILL = {
    ("gated_linear_attention_states_kernel", "bf16"): 16,  # keys given
    ("gated_linear_attention_fwd_kernel", "ieee"): 8,  # one direction, states
    # one direction, tiles of 16: 8; orders and log decays on gfx942: 12, on sm_100 also wide: 40
    ("gated_linear_attention_bwd_kernel", "ieee"): 40,
    ("gated_linear_attention_bwd_kernel", "tf32"): 32,  # one direction
    # of 40 channels, ptxas at 96 or 128 registers; other tiles move it to other targets: LOG.md
    ("linear_recurrence_bwd_kernel", "any width"): 32,
    # with a bias 8 on sm_100 and 32 on sm_120; the rest are 8 without registers being short
    ("depthwise_conv_bwd_kernel", "any taps"): 32,
    ("depthwise_conv_fwd_kernel", "any taps"): 8,
    # ptxas takes all 255 registers to have rows under way early; smaller tiles would write states
    # to memory more often: LOG.md
    ("selective_scan_bwd_kernel", "the models' width"): 48,
    ("selective_scan_bwd_kernel", "any width"): 48,
}
# Of scans; every target in the slow tests.
SOME = [
    pytest.param(t, marks=() if t in ("sm_90", "sm_100", "gfx942") else pytest.mark.slow)
    for t in TARGETS
]
# What else a call may bring: keys, the kind of decay, an order, states.
MODES = {
    "gate": {},
    "gate, key, order": {"key": True, "order": 2},
    "log decay": {"decay_mode": "log"},
    "undecayed": {"decay_mode": "none", "key": True},
    "order": {"order": 1},
    "states": {"states": True},
}


def launches(
    K, V, N, dot, direction, B=2, H=3, *, decay_mode="gate", key=False, order=0, states=False
):
    """Those of one forward and one backward pass, on slices of one projection, as a layer has."""
    dtype = DOTS[dot]
    x = torch.empty(B, N, H * (3 * K + V), dtype=dtype)
    q, gate, k, v = (t.unflatten(2, (H, -1)) for t in x.split([H * K, H * K, H * K, H * V], 2))
    visits = [None, torch.empty(N, dtype=torch.int32), torch.empty(H, N, dtype=torch.int64)][order]
    call = Call(
        q, v, k if key else None, None if decay_mode == "none" else gate, decay_mode, visits,
        16.0, K**-0.5, direction, "bf16" if dot == "fp16" else dot,
    )  # fmt: skip
    one, two = (padded([None] * n, call) if states else None for n in (1, 2))
    _, forward = forward_launches(call, dtype, one, one)
    _, backward = backward_launches(call, torch.empty(B, N, H, V, dtype=dtype), None, two, two)
    return [*forward, *backward]


def source(launch: Launch) -> ASTSource:
    """What Triton would compile for this launch: its types, and what it learns from the values."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = dict.fromkeys(names, "constexpr")
    constants, attributes = dict(launch.constants), {}
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not launch.kernel.params[i].do_not_specialize:
            constants[name] = value
        else:
            signature[name] = "i32"
        special = signature[name] == "i32" and not launch.kernel.params[i].do_not_specialize
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def compile_for(launch: Launch, target: GPUTarget, folder) -> tuple[int, int]:
    """Bytes spilled, and how many warp group instructions there are."""
    options = {"num_warps": launch.num_warps, "num_stages": 1}
    compiled = triton.compile(source(launch), target=target, options=options)
    if target.backend == "hip":
        spilled = re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert spilled, "the assembly has no .vgpr_spill_count"
        return sum(map(int, spilled)), 0
    (folder / "kernel").write_bytes(compiled.asm["cubin"])
    tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
    report = subprocess.run(
        [tool, "-res-usage", str(folder / "kernel")], capture_output=True, text=True, check=True
    )
    stack = re.findall(r"STACK:(\d+)", report.stdout)
    assert stack, report.stdout
    return sum(map(int, stack)), len(re.findall(r"wgmma|tcgen05", compiled.asm["ptx"]))


def norm_launches(K, V, dtype, mode):
    """Those of one forward and one backward pass of the gated norm."""
    options = dict(NORM_MODES[mode])
    norm = options.pop("norm", "layer")
    given = norm_inputs(49, K=K, V=V, dtype=dtype, **options)
    names = ("o", "output_gate", "bias", "q", "k", "gate", "v", "w_aug")
    call = NormCall(*(given.get(name) for name in names), 16.0, norm, 1e-5)
    return [forward_launch(call)[1], backward_launch(given["o"], call)[1]]


def conv_launches(grid, C, dtype, mode, B=256):
    """Those of one forward and one backward pass of the depthwise convolution; by default of so
    many samples that programs take several tiles."""
    inputs, padding = conv_inputs(grid, C=1, B=1, dtype=dtype, **CONV_MODES[mode])
    _, *taps = inputs["weight"].shape
    x = torch.empty(B, *inputs["x"].shape[1:3], 2 * C, dtype=dtype, device="meta")[..., C:]
    weight = torch.empty(C, *taps, dtype=dtype, device="meta")
    call = ConvCall(x, weight, weight[:, 0, 0] if "bias" in inputs else None, *padding.values())
    frozen = conv_backward_launches(x, call, of_taps=False)[1]
    return [output_launch(call)[1], *conv_backward_launches(x, call)[1], *frozen]


def recurrence_launches(M, C, N, dtype, direction, ordered=False, B=2):
    """Those of one forward and one backward pass of the linear recurrence."""
    b = torch.empty(B, N, M + 1, C, dtype=dtype)[:, :, :M]
    log_decay, visits = torch.empty(B, N, C), torch.empty(N, dtype=torch.int64)
    arguments = (log_decay, direction, visits if ordered else None, Edges)
    h, forward = triton_scan.forward_launches(b, *arguments)
    _, _, backward = triton_scan.backward_launches(torch.empty_like(h), h, *arguments)
    return [x for x in (*forward, *backward) if isinstance(x, Launch)]


def scan_launches(E, M, N, dtype, direction, ordered=False, plain=False, B=2):
    """Those of one forward and one backward pass of the selective scan."""
    D = 2 if direction == "bidirectional" else 1
    u, delta = (torch.empty(D, B, N, E, dtype=dtype) for _ in range(2))
    k, q = torch.empty(D, B, N, 2 * M, dtype=dtype).chunk(2, 3)
    of_channels = None if plain else torch.empty(D, E)
    visits = torch.empty(N, dtype=torch.int64) if ordered else None
    call = ScanCall(
        u, delta, torch.empty(D, E, M), k, q, of_channels, of_channels, direction, visits
    )
    _, forward = scan_forward_launches(call, torch.float32, lambda *_: None)
    _, backward = scan_backward_launches(call, u, lambda *_: None)
    return [x for x in (*forward, *backward) if x is not None]


def check(target, K, V, N, dot, direction, folder, **shape):
    check_launches(target, launches(K, V, N, dot, direction, **shape), dot, folder)


def check_launches(target, of_a_call, dot, folder):
    seen = set()
    for launch in of_a_call:
        name = launch.kernel.__name__
        key = (name, tuple(launch.constants.items()))
        if key in seen:
            continue
        seen.add(key)
        spilled, warp_group = compile_for(launch, TARGETS[target], folder)
        assert spilled <= MAY_SPILL.get((name, dot), 0), (name, launch.constants, spilled)
        assert warp_group == 0, (name, launch.constants)


@pytest.mark.parametrize("N", [196, 300], ids=["one-segment", "segments"])
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_every_width_compiles_for_an_h100(K, V, N, tmp_path):
    check("sm_90", K, V, N, "bf16", "bidirectional", tmp_path)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_compiles_for_an_h100(direction, tmp_path):
    check("sm_90", 32, 64, 300, "bf16", direction, tmp_path)


@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_every_mode_compiles_for_an_h100(mode, tmp_path):
    direction = "forward" if mode == "states" else "bidirectional"
    check("sm_90", 32, 64, 196, "bf16", direction, tmp_path, **MODES[mode])


@pytest.mark.parametrize("dot", ["fp16", "ieee", "tf32"])
def test_every_type_compiles_for_an_h100(dot, tmp_path):
    check("sm_90", 32, 64, 300, dot, "bidirectional", tmp_path)


@pytest.mark.parametrize(("K", "V", "N"), [(1, 1, 1), (40, 1, 1), (1, 1, 257)])
def test_arguments_that_are_one_compile(K, V, N, tmp_path):
    """Triton makes constants of them."""
    check("sm_90", K, V, N, "bf16", "bidirectional", tmp_path, B=1, H=1)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_90"])
def test_the_models_widths_compile_for_every_target(target, tmp_path):
    check(target, 32, 64, 196, "bf16", "bidirectional", tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", NORM_MODES)
def test_the_gated_norm_compiles_for_an_h100(mode, dtype, tmp_path):
    check_launches("sm_90", norm_launches(32, 64, dtype, mode), "", tmp_path)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_90"])
def test_the_models_gated_norm_compiles_for_every_target(target, tmp_path):
    check_launches(target, norm_launches(32, 64, torch.bfloat16, "gate"), "", tmp_path)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [*product(CONV_MODES, [torch.bfloat16]), ("3x3, bias", torch.float32)],
    ids=str,
)
def test_the_depthwise_convolution_compiles_for_an_h100(mode, dtype, tmp_path):
    check_launches("sm_90", conv_launches((14, 14), 192, dtype, mode), "", tmp_path)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "sm_90"])
def test_the_models_depthwise_convolution_compiles_for_every_target(target, tmp_path):
    check_launches(target, conv_launches((14, 14), 192, torch.bfloat16, "3x3"), "", tmp_path)


@pytest.mark.parametrize("target", SOME)
def test_the_models_linear_recurrence_compiles_for_every_target(target, tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        of_a_call = recurrence_launches(2, 192, 600, dtype, "bidirectional")
        check_launches(target, of_a_call, "the models' width", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "width", "N", "dtype", "direction", "ordered"),
    list(product(
        TARGETS, ((1, 1), (2, 40), (1, 384)), (1, 196, 600),
        (torch.bfloat16, torch.float16, torch.float32), ("backward", "bidirectional"),
        (False, True),
    )),
)  # fmt: skip
def test_every_linear_recurrence_compiles(target, width, N, dtype, direction, ordered, tmp_path):
    of_a_call = recurrence_launches(*width, N, dtype, direction, ordered, B=1 if N == 1 else 2)
    check_launches(target, of_a_call, "any width", tmp_path)


@pytest.mark.parametrize("target", SOME)
def test_the_models_selective_scan_compiles_for_every_target(target, tmp_path):
    of_a_call = scan_launches(384, 16, 600, torch.bfloat16, "bidirectional")
    check_launches(target, of_a_call, "the models' width", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "width", "N", "dtype", "direction", "ordered"),
    list(product(
        TARGETS, ((1, 1), (40, 5), (384, 16), (256, 64)), (1, 196, 600),
        (torch.bfloat16, torch.float16, torch.float32), ("backward", "bidirectional"),
        (False, True),
    )),
)  # fmt: skip
def test_every_selective_scan_compiles(target, width, N, dtype, direction, ordered, tmp_path):
    of_a_call = scan_launches(
        *width, N, dtype, direction, ordered, plain=ordered, B=1 if N == 1 else 2
    )
    check_launches(target, of_a_call, "any width", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "width", "dtype", "mode"),
    list(product(
        TARGETS, (*WIDTHS, (1, 1), (33, 65)), (torch.bfloat16, torch.float16, torch.float32),
        NORM_MODES,
    )),
)  # fmt: skip
def test_every_gated_norm_compiles(target, width, dtype, mode, tmp_path):
    check_launches(target, norm_launches(*width, dtype, mode), "", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "grid", "C", "dtype", "mode"),
    list(product(
        TARGETS, ((1, 1), (14, 14)), (1, 40, 384),
        (torch.bfloat16, torch.float16, torch.float32), CONV_MODES,
    )),
)  # fmt: skip
def test_every_depthwise_convolution_compiles(target, grid, C, dtype, mode, tmp_path):
    of_a_call = conv_launches(grid, C, dtype, mode, 1 + 255 * (C > 1))
    check_launches(target, of_a_call, "any taps", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "width", "N", "dot", "direction"),
    list(product(TARGETS, WIDTHS, (196, 300), DOTS, ("forward", "backward", "bidirectional"))),
)
def test_everything_compiles_for_every_target(target, width, N, dot, direction, tmp_path):
    if target == "gfx942" and dot == "tf32":
        pytest.skip("Triton has TF32 for NVIDIA alone; fused.precision does not ask for it")
    check(target, *width, N, dot, direction, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "width", "N", "dot", "direction", "mode"),
    list(product(
        ("sm_90", "sm_100", "gfx942"), ((32, 64), (64, 128)), (196, 300), ("bf16", "ieee"),
        ("forward", "bidirectional"), list(MODES)[1:],
    )),
)  # fmt: skip
def test_every_mode_compiles(target, width, N, dot, direction, mode, tmp_path):
    if mode == "states" and direction == "bidirectional":
        pytest.skip("states are for one direction")
    check(target, *width, N, dot, direction, tmp_path, **MODES[mode])


def test_up_to_256_tokens_a_forward_pass_is_one_launch():
    def forward(N):
        names = [x.kernel.__name__ for x in launches(32, 64, N, "bf16", "bidirectional")]
        return names.index("gated_linear_attention_fwd_kernel") + 1

    assert [forward(N) for N in (1, 196, 256, 257, 4096)] == [1, 1, 1, 3, 3]


def test_a_spill_is_noticed(tmp_path):
    forward = [x for x in launches(32, 64, 196, "ieee", "bidirectional") if "fwd" in str(x.kernel)]
    crowded = forward[0]._replace(num_warps=1)
    assert compile_for(crowded, TARGETS["sm_90"], tmp_path)[0] > 0


def test_a_warp_group_instruction_is_noticed(tmp_path):
    launch = launches(32, 64, 196, "bf16", "bidirectional")[1]
    wide = launch._replace(constants={**launch.constants, "BK": 64}, num_warps=4)
    assert compile_for(wide, TARGETS["sm_90"], tmp_path)[1] > 0

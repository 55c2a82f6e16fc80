"""Whole models as a GPU gets them, on a machine without one: `make test-kernels`.

A driver that stands in for the GPU's has every launch compiled for an H100, from the arguments that
the launch really has (Triton makes constants of those that are 1 and marks those that 16 divides),
and launches nothing: what is computed is whatever memory held. test_aot.py holds the kernels
themselves to what they may use, test_gpu.py to what they must compute.
"""

import contextlib
from collections import Counter

import pytest
import timm
import torch

pytest.importorskip("triton")

from metala_vision.kernels._fused import interpreted, triton_version

if interpreted():
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
if triton_version() < (3, 6):
    pytest.skip("a driver's interface is Triton's own; here it is 3.6's", allow_module_level=True)
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

import metala_vision  # noqa: F401 # registers the models
from metala_vision.kernels.depthwise_conv import api as conv_api
from metala_vision.kernels.gated_linear_attention import api as attention_api
from metala_vision.kernels.gated_norm import api as norm_api
from metala_vision.kernels.linear_recurrence import api as recurrence_api
from metala_vision.kernels.selective_scan import api as scan_api
from metala_vision.layers import conv, metala

pytestmark = pytest.mark.aot

H100 = {
    "max_shared_mem": 232448,
    "multiprocessor_count": 132,
    "max_num_regs": 65536,
    "warpSize": 32,
}
CONV, CONV_BACKWARD = {"conv_fwd": 1}, {"conv_bwd": 1, "conv_fwd": 1}  # of the map, of the taps
NORM, NORM_BACKWARD = {"norm_fwd": 1}, {"norm_bwd": 1}
ATTENTION_BACKWARD = {"attention_states": 1, "attention_bwd": 1}
NARROW = {"attention_fwd": 1}
WIDE = {"attention_states": 1, "attention_fwd_wide": 1}  # more than one tile of keys or values
RECURRENCE = (CONV | {"recurrence_fwd": 1}, CONV_BACKWARD | {"recurrence_bwd": 1})
# Launches of a block of up to 256 tokens, forward and backward.
FAMILIES = {
    "metala": (CONV | NARROW | NORM, CONV_BACKWARD | ATTENTION_BACKWARD | NORM_BACKWARD),
    "gla": (CONV | NARROW | NORM, CONV_BACKWARD | ATTENTION_BACKWARD | NORM_BACKWARD),
    "retnet": (CONV | WIDE | NORM, CONV_BACKWARD | ATTENTION_BACKWARD | NORM_BACKWARD),
    "hgrn2": (CONV | WIDE, CONV_BACKWARD | ATTENTION_BACKWARD),
    "regla": (CONV | WIDE, CONV_BACKWARD | ATTENTION_BACKWARD),
    "hgrn": RECURRENCE,
    "lru": RECURRENCE,
    "mamba": (  # a convolution for each direction; the scan's states are made again
        {"conv_fwd": 2, "scan_fwd": 1},
        {"conv_bwd": 2, "conv_fwd": 2, "scan_fwd": 1, "scan_bwd": 1},
    ),
    # Products that the library has.
    "attention": (CONV, CONV_BACKWARD),
    "eva_attention": (CONV, CONV_BACKWARD),
    "linear_attention": (CONV, CONV_BACKWARD),
}
SHORT = {
    "depthwise_conv": "conv", "gated_linear_attention": "attention", "gated_norm": "norm",
    "linear_recurrence": "recurrence", "selective_scan": "scan",
}  # fmt: skip


LAUNCHED: Counter[str] = Counter()  # of all drivers: Triton keeps a kernel and its launcher


class Driver:
    """What Triton asks of a GPU's driver; launches are counted by kernel."""

    class launcher_cls:
        def __init__(self, source, metadata):
            operator, _, rest = source.fn.__name__.partition("_kernel")
            for name, short in SHORT.items():
                operator = operator.replace(name, short)
            self.name = operator + rest

        def __call__(self, *arguments):
            LAUNCHED[self.name] += 1

    @property
    def utils(self):
        return self

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 1 << 20  # Triton keeps kernels by device: no GPU is to find these

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return H100

    def load_binary(self, name, kernel, shared, device):
        """Module, function, registers, spilled bytes, threads in a program at most."""
        return 1, 1, 0, 0, 1024

    def launches(self):
        """Since the last call."""
        found = dict(LAUNCHED)
        LAUNCHED.clear()
        return found


@pytest.fixture
def h100(monkeypatch):
    """Calls with impl="auto" as on a GPU, which is not there."""
    for api in (attention_api, conv_api, norm_api, recurrence_api, scan_api):
        monkeypatch.setattr(api, "implementations", lambda x, impl, *_: ("triton",))
    monkeypatch.setattr(conv, "on_gpu", lambda x: True)
    monkeypatch.setattr(metala, "takes_decays", lambda q: False)
    before = driver._active
    stand_in = Driver()
    stand_in.launches()
    driver.set_active(stand_in)
    yield stand_in
    driver._active = before


def step(name, h100, dtype=torch.bfloat16, size=32, **options):
    """Launches of a block: a forward and a backward pass; a pass without gradients is as the
    first."""
    depth = 2
    model = timm.create_model(name, img_size=size, patch_size=8, depth=depth, **options)
    x = torch.zeros(2, 3, size, size)
    found = []
    for enabled in (True, False):
        with (
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            contextlib.nullcontext() if enabled else torch.no_grad(),
        ):
            y = model(x)
        found.append(h100.launches())
        if enabled:
            y.float().sum().backward()
            found.append(h100.launches())
    forward, backward, inference = ({k: n / depth for k, n in f.items()} for f in found)
    assert inference == forward
    return forward, backward


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_and_inference_of_every_family(family, h100):
    assert step(f"{family}_nano", h100) == FAMILIES[family]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_other_types(dtype, h100):
    assert step("metala_nano", h100, dtype) == FAMILIES["metala"]


@pytest.mark.parametrize(
    "name", ["metala_nano_hilbert", "metala_nano_causal", "metala_small_paper"]
)
def test_other_models(name, h100):
    step(name, h100)


def twice(launches, kernels):
    return {name: n * (1 + name.startswith(kernels)) for name, n in launches.items()}


def test_a_decay_per_direction_takes_a_pass_of_attention_for_each(h100):
    forward, backward = FAMILIES["metala"]
    found = step("metala_nano", h100, shared_decay=False)
    assert found == (twice(forward, "attention"), twice(backward, "attention"))


def test_long_sequences_take_launches_for_the_states_between_segments(h100):
    forward, backward = FAMILIES["metala"]
    more = {"attention_states": 1, "attention_scan": 1}
    found = step("metala_nano", h100, size=136)  # 289 tokens
    assert found == (forward | more, backward | more | {"attention_states": 2})
    forward, backward = FAMILIES["hgrn"]
    found = step("hgrn_nano", h100, size=184)  # 529 tokens
    assert found == (twice(forward, "recurrence"), twice(backward, "recurrence"))
    forward, backward = FAMILIES["mamba"]
    found = step("mamba_nano", h100, size=184)
    assert found == (twice(forward, "scan_fwd"), twice(backward, "scan"))


def test_metala_gives_the_kernels_its_gates(h100, monkeypatch):
    """On a CPU it makes decays and keys first; the launches are as many."""
    given, operator = [], metala.gated_linear_attention_op

    def spy(q, v, k, gate, log_decay, *options):
        given.append((k is None, gate is not None, log_decay is None))
        return operator(q, v, k, gate, log_decay, *options)

    monkeypatch.setattr(metala, "gated_linear_attention_op", spy)
    step("metala_nano", h100)
    assert set(given) == {(True, True, True)}


def test_what_a_gpu_would_refuse_is_noticed(h100, monkeypatch):
    """Of a width of its own: Triton keeps what failed."""
    monkeypatch.setattr(compiler, "max_shared_mem", lambda device: 1)  # keeps what a driver said
    with pytest.raises(OutOfResources, match="out of resource: shared memory"):
        step("metala_nano", h100, embed_dim=80, num_heads=1)

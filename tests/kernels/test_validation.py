"""Every mistake in a call is a ValueError that names the argument and the value."""

import pytest
import torch

from metala_vision.kernels._impl import choose
from metala_vision.kernels.gated_linear_attention import gated_linear_attention

B, N, H, K, V = 2, 6, 2, 4, 3


def call(**changes):
    arguments = {
        "q": torch.zeros(B, N, H, K),
        "v": torch.zeros(B, N, H, V),
        "gate": torch.zeros(B, N, H, K),
    }
    arguments.update(changes)
    return gated_linear_attention(**arguments)


def test_the_unchanged_call_works():
    assert call().shape == (B, N, H, V)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(B, N, K)}, r"q must be \[B, N, H, K\], got shape \[2, 6, 4\]"),
        ({"v": torch.zeros(B, N + 1, H, V)}, r"v must be .*got shape \[2, 7, 2, 3\]"),
        ({"k": torch.zeros(B, N, H, K + 1)}, r"k must have q's shape .*got \[2, 6, 2, 5\]"),
        ({"gate": torch.zeros(B, N, H)}, r"gate must be .*got \[2, 6, 2\]"),
        ({"gate": torch.zeros(3, B, N, H, K)}, r"gate must be .*got \[3, 2, 6, 2, 4\]"),
        (
            {"gate": torch.zeros(2, B, N, H, K), "direction": "forward"},
            "needs direction='bidirectional', got 'forward'",
        ),
        ({"log_decay": torch.zeros(B, N, H, K)}, "gate or log_decay, not both"),
        ({"gate": None}, "k=None stands for 1 - alpha and needs gate or log_decay"),
        (
            {"gate": None, "log_decay": torch.full((B, N, H, K), 0.5)},
            r"log_decay must be <= 0, got 0\.5",
        ),
        ({"gate_divisor": 0.0}, r"gate_divisor must be > 0, got 0\.0"),
        ({"direction": "both"}, "direction='both' is unknown; accepted: forward, backward"),
        ({"impl": "cuda"}, "impl='cuda' is unknown; accepted: auto, triton"),
        ({"impl": "triton"}, "impl='triton' is not available here; accepted: auto, chunked"),
        ({"q": torch.zeros(B, N, H, K).int()}, r"q has dtype torch\.int32; accepted"),
        (
            {"v": torch.zeros(B, N, H, V).half()},
            r"v has dtype torch\.float16, q has torch\.float32",
        ),
        ({"q": torch.zeros(B, N, K, H).mT}, "q needs a contiguous last dimension, got strides"),
        ({"gate": torch.zeros(B, N, H, K, device="meta")}, "gate is on meta, q on cpu"),
        (
            {"order": torch.arange(N - 1)},
            r"order must be \[6\] or \[2, 6\] .*got torch\.int64 \[5\]",
        ),
        ({"order": torch.arange(N).float()}, r"\[2, 6\] int32 or int64, got torch\.float32 \[6\]"),
        (
            {"order": torch.zeros(N).int()},
            r"order must hold each of 0 \.\.\. 5 once, starts with \[0, 0",
        ),
        ({"output_final_state": True}, "need direction='forward' or 'backward'"),
        ({"initial_state": torch.zeros(B, H, K, V)}, "need direction='forward' or 'backward'"),
        (
            {"initial_state": torch.zeros(B, H, V, K), "direction": "forward"},
            r"initial_state must be \[2, 2, 4, 3\], got \[2, 2, 3, 4\]",
        ),
        (
            {"initial_state": torch.zeros(B, H, K, V).half(), "direction": "forward"},
            "initial_state must be float32 or float64",
        ),
    ],
)
def test_a_mistake_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "shapes", [((0, N, H, K), V), ((B, 0, H, K), V), ((B, N, 0, K), V), ((B, N, H, 0), V)]
)
def test_no_dimension_is_zero(shapes):
    shape, width = shapes
    with pytest.raises(ValueError, match="no dimension may be 0"):
        call(q=torch.zeros(shape), gate=torch.zeros(shape), v=torch.zeros(*shape[:3], width))


@pytest.mark.parametrize(("key", "value"), [(129, 3), (4, 257)])
def test_widths_have_a_limit(key, value):
    q = torch.zeros(1, 2, 1, key)
    with pytest.raises(ValueError, match=f"got K={key} and V={value}"):
        call(q=q, gate=q, v=torch.zeros(1, 2, 1, value))


def test_auto_takes_the_first_and_a_name_is_obeyed():
    assert choose("auto", ("chunked", "reference")) == "chunked"
    assert choose("reference", ("chunked", "reference")) == "reference"

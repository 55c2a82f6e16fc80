"""What a block compiled for a GPU keeps for its backward pass: torch's partitioner decides it."""

import pytest
import timm
import torch

from metala_vision.kernels.depthwise_conv import library as conv_library
from metala_vision.kernels.gated_norm import library as norm_library
from tests.benchmarks._load import load
from tests.kernels._common import one_node

saved = load("saved")
saved_bytes = saved.saved_bytes
pytestmark = one_node
B, SIDE, C = 16, 14, 192  # so many that weights are few
TOKENS = B * SIDE**2
HIDDEN = 576  # of metala_tiny's GLU


@pytest.fixture
def as_on_a_gpu():
    with saved.as_on_a_gpu():
        yield


def block_and_map(name):
    model = timm.create_model(name, depth=1).train()
    shape = (B, SIDE, SIDE, C) if name.startswith("metala") else (B, SIDE**2, C)
    return model.blocks[0], torch.randn(shape, requires_grad=True)


def test_a_block_saves_each_intermediate_once_in_sixteen_bits(as_on_a_gpu):
    """Norm, convolution with its SiLU, projections, operator, norm and gate, norm, the GLU's two
    projections and their product; the residual in float32. Besides only weights and statistics."""
    block, x = block_and_map("metala_tiny")
    H, K = block.mixer.num_heads, block.mixer.key_width
    widths = 2 * C + 2 * (H * K + C) + 2 * C + C + 3 * HIDDEN + 2 * C
    exact = 2 * TOKENS * widths
    weights = 2 * sum(p.numel() for p in block.parameters())
    assert exact <= saved_bytes(block, x) <= 1.01 * exact + weights


def test_without_the_convolutions_node_it_would_save_what_stands_before_silu(
    as_on_a_gpu, monkeypatch
):
    block, x = block_and_map("metala_tiny")
    few = saved_bytes(block, x)
    monkeypatch.setattr(conv_library, "wanted", lambda device: False)
    assert saved_bytes(block, x) >= few + 2 * TOKENS * C


def test_without_the_norms_node_it_would_save_float32_too(as_on_a_gpu, monkeypatch):
    block, x = block_and_map("metala_tiny")
    few = saved_bytes(block, x)
    monkeypatch.setattr(norm_library, "wanted", lambda device: False)
    H, K, V = block.mixer.num_heads, block.mixer.key_width, block.mixer.value_width
    assert saved_bytes(block, x) >= few + 4 * TOKENS * H * (K + V)  # of queries and values alone


def test_a_block_saves_no_more_than_a_quarter_above_deits(as_on_a_gpu):
    """The goal for a training step at 224 px; timm's block by scaled_dot_product_attention."""
    ours, deit = (
        saved_bytes(*block_and_map(name)) for name in ("metala_tiny", "deit_tiny_patch16_224")
    )
    assert ours <= 1.25 * deit, ours / deit

"""What a compiled block launches, and that nothing in it is copied: `make test-export`."""

import re
from functools import partial

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from metala_vision.layers import Block, MetaLAMixer
from tests.benchmarks._load import load

pytestmark = [
    pytest.mark.export,
    # torch's own, inside Inductor.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.skipif(
        not hasattr(torch.compiler, "_is_exporting_flag"),
        reason="before torch 2.7 the operator is not one node",
    ),
]


def launched(function, x):
    """How many calls of each kind a compiled function makes, by the code that Inductor writes."""
    torch.compiler.reset()
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(function, fullgraph=True), x)
    (code,) = codes  # one graph
    body = code[code.index("def call") :]
    return {
        "products": len(
            re.findall(r"extern_kernels\.(?:add)?mm\(|_mkl_linear|_linear_pointwise", body)
        ),
        "convolutions": len(
            re.findall(r"extern_kernels\.convolution\(|_convolution_pointwise", body)
        ),
        "operators": len(re.findall(r"= torch\.ops\.metala_vision\.gated_linear_attention", body)),
        "our convolutions": len(re.findall(r"= torch\.ops\.metala_vision\.depthwise_conv", body)),
        "norms": len(re.findall(r"= torch\.ops\.metala_vision\.gated_norm", body)),
        "fused": len(re.findall(r"^ +cpp_fused\w+\(", body, re.M)),
        "copies": len(re.findall(r"\.copy_\(|\.clone\(|cpp_fused_(?:clone|copy|cat)\w*\(", body)),
    }


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block(64, partial(MetaLAMixer, num_heads=1)).eval()


def test_a_block_is_five_products_and_convolutions_one_operator_and_seven_fused_kernels(block):
    """Fused: norm; SiLU; decay and key; self-augmentation, norm and gate; residual and norm; GLU;
    residual."""
    counted = launched(block, torch.randn(2, 8, 8, 64))
    assert counted == {
        "products": 4, "convolutions": 1, "our convolutions": 0, "operators": 1, "norms": 0,
        "fused": 7, "copies": 0,
    }  # fmt: skip


def test_more_would_be_noticed(block):
    counted = launched(lambda x: block(block(x)), torch.randn(2, 8, 8, 64))
    assert counted["products"] == 8 and counted["operators"] == 2 and counted["fused"] > 7


@pytest.mark.slow
def test_as_on_a_gpu_three_nodes_leave_four_fused_kernels_and_no_copy(block):
    """Fused: norm; residual and norm; GLU; residual. Two nodes read slices of a product."""
    with load("saved").as_on_a_gpu():
        counted = launched(block, torch.randn(2, 8, 8, 64))
    assert counted == {
        "products": 4, "convolutions": 0, "our convolutions": 1, "operators": 1, "norms": 1,
        "fused": 4, "copies": 0,
    }  # fmt: skip

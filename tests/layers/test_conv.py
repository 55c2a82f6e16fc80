"""The short convolution by itself; in mixers it is in test_mixers.py."""

import pytest
import torch

from metala_vision.layers.conv import TokenConv
from tests._numerics import normal
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

"""Values that associative recall refuses before anything is trained."""

import pytest

from metala_vision.errors import UserError
from metala_vision.probe.mqar_sweep import Sweep


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # a 3x3 convolution on a row hears of the next token
        ({"conv": "depthwise2d"}, r"^--conv depthwise2d: accepted are published, causal1d, "),
        ({"conv": "causal1d(0)"}, r"^--conv causal1d\(0\): accepted are published"),
        ({"conv": "causal1d(513)"}, r"^--conv causal1d\(513\): the longest of --lengths is 512"),
        ({"seeds": [0, 2**64]}, r"^--seeds needs numbers below 2\^32, got 18446744073709551616"),
        ({"learning_rates": [1e-3, 1.0001e-3]}, r"^--learning-rates: 0.0010001 is too near"),
    ],
)
def test_refused(values, message):
    with pytest.raises(UserError, match=message):
        Sweep(**values).check()


@pytest.mark.parametrize("conv", ["published", "none", "causal1d", "causal1d(2)", "causal1d(512)"])
def test_accepted(conv):
    Sweep(conv=conv, learning_rates=[1e-3, 1.01e-3]).check()

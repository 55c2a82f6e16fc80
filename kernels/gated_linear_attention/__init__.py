"""Gated linear attention: api.py is the entrance, reference.py the definition."""

from metala_vision.kernels._portable import decay_and_key
from metala_vision.kernels.gated_linear_attention.api import (
    DIRECTIONS,
    MAX_KEY_WIDTH,
    MAX_VALUE_WIDTH,
    gated_linear_attention,
    gated_linear_attention_op,
)

__all__ = [
    "DIRECTIONS",
    "MAX_KEY_WIDTH",
    "MAX_VALUE_WIDTH",
    "decay_and_key",
    "gated_linear_attention",
    "gated_linear_attention_op",
]

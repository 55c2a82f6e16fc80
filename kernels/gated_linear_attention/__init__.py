"""Gated linear attention: api.py is the entrance, reference.py the definition."""

from .api import DIRECTIONS, gated_linear_attention, gated_linear_attention_op
from .chunked import decay_and_key

__all__ = ["DIRECTIONS", "decay_and_key", "gated_linear_attention", "gated_linear_attention_op"]

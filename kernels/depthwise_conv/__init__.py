"""Depthwise convolution of a token map and SiLU: api.py is the entrance, reference.py the
definition."""

from metala_vision.kernels.depthwise_conv.api import depthwise_conv_silu, depthwise_conv_silu_op

__all__ = ["depthwise_conv_silu", "depthwise_conv_silu_op"]

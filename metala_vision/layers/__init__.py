"""Token mixers and the block around them. Layers take and return maps [B, Gh, Gw, C] (NHWC)."""

from .block import Block
from .conv import TokenConv
from .metala import MetaLAMixer

__all__ = ["Block", "MetaLAMixer", "TokenConv"]

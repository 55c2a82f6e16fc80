"""Token mixers and the block around them. Layers take and return maps [B, Gh, Gw, C] (NHWC)."""

from .block import Block
from .conv import TokenConv
from .metala import MetaLAMixer
from .pos_embed import SinCos2d, check_pos_embed
from .scan import ORDERS, check_scans, inverse, scan_order

__all__ = [
    "ORDERS",
    "Block",
    "MetaLAMixer",
    "SinCos2d",
    "TokenConv",
    "check_pos_embed",
    "check_scans",
    "inverse",
    "scan_order",
]

"""Token mixers and the block around them. Layers take and return maps [B, Gh, Gw, C] (NHWC)."""

from .attention import AttentionMixer
from .block import Block, BoundedBlock
from .conv import TokenConv
from .eva_attention import EVAAttentionMixer
from .gla import GLAMixer
from .hgrn import HGRNMixer
from .hgrn2 import HGRN2Mixer
from .linear_attention import LinearAttentionMixer
from .lower_bound import LowerBounds
from .lru import LRUMixer
from .mamba import MambaMixer, check_mamba
from .metala import MetaLAMixer
from .mixer import TokenMixer
from .pos_embed import SinCos2d, check_pos_embed
from .regla import ReGLAMixer
from .retnet import RetNetMixer
from .scan import ORDERS, check_scans, inverse, scan_order
from .unified import Functions, HeadNorm, Normaliser, Shared, UnifiedMixer
from .unified_instances import unified

__all__ = [
    "ORDERS",
    "AttentionMixer",
    "Block",
    "BoundedBlock",
    "EVAAttentionMixer",
    "Functions",
    "GLAMixer",
    "HGRN2Mixer",
    "HGRNMixer",
    "HeadNorm",
    "LRUMixer",
    "LinearAttentionMixer",
    "LowerBounds",
    "MambaMixer",
    "MetaLAMixer",
    "Normaliser",
    "ReGLAMixer",
    "RetNetMixer",
    "Shared",
    "SinCos2d",
    "TokenConv",
    "TokenMixer",
    "UnifiedMixer",
    "check_mamba",
    "check_pos_embed",
    "check_scans",
    "inverse",
    "scan_order",
    "unified",
]

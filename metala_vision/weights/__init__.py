"""Pretrained weights: those that ship, and how others are found, downloaded and checked."""

from .check import check_entry, check_file, check_tensors
from .manifest import Entry, Manifest
from .source import Weights, cache_folder, locate, shipped, tags_of

__all__ = [
    "Entry",
    "Manifest",
    "Weights",
    "cache_folder",
    "check_entry",
    "check_file",
    "check_tensors",
    "locate",
    "shipped",
    "tags_of",
]

"""Model families; importing this package registers every model with timm."""

import timm

from . import (
    attention,
    eva_attention,
    gla,
    hgrn,
    hgrn2,
    linear_attention,
    lru,
    mamba,
    metala,
    regla,
    retnet,
)
from .backbone import Backbone

FAMILIES = (
    "metala", "attention", "eva_attention", "gla", "hgrn", "hgrn2", "linear_attention", "lru",
    "mamba", "regla", "retnet",
)  # fmt: skip


def list_models(filter: str | list[str] = "") -> list[str]:
    """The names of this package's models, those that fit timm's filter (wildcards)."""
    return [name for family in FAMILIES for name in timm.list_models(filter, module=family)]


__all__ = [
    "FAMILIES",
    "Backbone",
    "attention",
    "eva_attention",
    "gla",
    "hgrn",
    "hgrn2",
    "linear_attention",
    "list_models",
    "lru",
    "mamba",
    "metala",
    "regla",
    "retnet",
]

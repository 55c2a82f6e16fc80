"""Model families; importing this package registers every model with timm."""

import timm

from . import attention, gla, hgrn2, linear_attention, metala, retnet
from .backbone import Backbone

FAMILIES = ("metala", "attention", "gla", "hgrn2", "linear_attention", "retnet")


def list_models(filter: str | list[str] = "") -> list[str]:
    """The names of this package's models, those that fit timm's filter (wildcards)."""
    return [name for family in FAMILIES for name in timm.list_models(filter, module=family)]


__all__ = [
    "FAMILIES",
    "Backbone",
    "attention",
    "gla",
    "hgrn2",
    "linear_attention",
    "list_models",
    "metala",
    "retnet",
]

"""Model families; importing this package registers every model with timm."""

from . import metala
from .backbone import Backbone

__all__ = ["Backbone", "metala"]

"""`metala-vision export`: a trained model as one file that runs without this package."""

from .command import add_arguments, run
from .wanted import Export

__all__ = ["Export", "add_arguments", "run"]

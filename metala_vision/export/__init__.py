"""`metala-vision export`: a trained model as one file that runs without this package."""

from .command import Export, add_arguments, run

__all__ = ["Export", "add_arguments", "run"]

"""`metala-vision scaling`: time and memory of a pass as the images grow."""

from .command import ScalingConfig, add_arguments, prepared, run, scaling
from .table import Measured

__all__ = ["Measured", "ScalingConfig", "add_arguments", "prepared", "run", "scaling"]

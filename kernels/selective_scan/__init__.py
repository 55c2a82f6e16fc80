"""The selective scan of Mamba: api.py is the entrance, reference.py the definition."""

from metala_vision.kernels.selective_scan.api import (
    MAX_STATES,
    selective_scan,
    selective_scan_op,
)

__all__ = ["MAX_STATES", "selective_scan", "selective_scan_op"]

"""Per-head norm and output gate: api.py is the entrance, reference.py the definition."""

from metala_vision.kernels.gated_norm.api import NORMS, gated_norm, gated_norm_op

__all__ = ["NORMS", "gated_norm", "gated_norm_op"]

"""The linear recurrence: api.py is the entrance, reference.py the definition."""

from metala_vision.kernels.linear_recurrence.api import linear_recurrence, linear_recurrence_op

__all__ = ["linear_recurrence", "linear_recurrence_op"]

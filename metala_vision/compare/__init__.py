"""`metala-vision compare`: several backbones under one recipe, as a table and a report."""

from .comparison import CompareConfig, Member, check_matched, load_comparison, member_config
from .run import compare
from .table import Row, as_markdown

__all__ = [
    "CompareConfig",
    "Member",
    "Row",
    "as_markdown",
    "check_matched",
    "compare",
    "load_comparison",
    "member_config",
]

"""Top-1 on ImageNet-1k that papers print, to stand beside what is measured here.

Each after 300 epochs at 224 pixels by the recipe of its own paper: two of them differ in more than
the model. MetaLA's table does not say direction, convolution or pooling of its models; ours of that
size stand beside its figure.
"""

from typing import NamedTuple

DEIT = "DeiT, arXiv 2012.12877, Table 5"
METALA = "MetaLA, arXiv 2411.10741, Table 6"


class Published(NamedTuple):
    """top1 in percent; the source names the text that prints it."""

    top1: float
    source: str


PUBLISHED = {
    "deit_tiny_patch16_224": Published(72.2, DEIT),
    "deit_small_patch16_224": Published(79.8, DEIT),
    "gla_small": Published(79.23, METALA),
    "gla_tiny": Published(72.47, METALA),
    "hgrn_small": Published(80.09, METALA),
    "hgrn_tiny": Published(74.40, METALA),
    "mamba_small": Published(79.60, METALA),
    "mamba_tiny": Published(73.39, METALA),
    "metala_small": Published(80.14, METALA),
    "metala_small_paper": Published(80.14, METALA),
    "metala_tiny": Published(75.33, METALA),
    "metala_tiny_paper": Published(75.33, METALA),
}

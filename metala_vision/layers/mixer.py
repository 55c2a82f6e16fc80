"""What every token mixer takes: heads, a short convolution, a direction, scan orders."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from metala_vision.kernels.gated_linear_attention import (
    DIRECTIONS,
    MAX_KEY_WIDTH,
    MAX_VALUE_WIDTH,
)

from .conv import TokenConv
from .scan import check_scans


class TokenMixer(nn.Module):
    """Base of the token mixers: maps [B, Gh, Gw, C] to maps, in raster order.

    Args:
        dim: C, divisible by widths * num_heads.
        num_heads: H.
        conv: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none", see TokenConv; always along
            the raster.
        direction: "forward", "backward" or "bidirectional": which tokens a token hears of.
        scans: the order in which tokens are visited, see scan_order; several names divide the
            heads among them. The output is in raster order whatever the scan.
        widths: into how many parts a head's share of C is cut.
        own_conv: whether the mixer makes its convolution itself.
    Raises:
        ValueError: naming the option, its value and what is accepted.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        conv: str,
        direction: str,
        scans: str | Sequence[str],
        widths: int = 1,
        own_conv: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % (widths * num_heads):
            factor = "" if widths == 1 else f"{widths} * "
            raise ValueError(
                f"dim={dim} is not divisible by {factor}num_heads={widths * num_heads}"
            )
        if direction not in DIRECTIONS:
            raise ValueError(
                f"direction={direction!r} is unknown; accepted: {', '.join(DIRECTIONS)}"
            )
        scan_names = check_scans(scans)
        if num_heads % len(scan_names):
            raise ValueError(
                f"num_heads={num_heads} cannot be divided among {len(scan_names)} scan orders "
                f"{scan_names}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.direction = direction
        self.scans = list(scan_names)
        if not own_conv:
            self.conv = TokenConv(dim, conv, direction, **dd)


def check_sizes(**sizes: object) -> None:
    """A ValueError that names the first value which is no whole number >= 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def check_option(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """The value unchanged, or a ValueError with the accepted ones."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is unknown; accepted: {', '.join(accepted)}")
    return value


def check_decays(shared_decay: bool, direction: str) -> None:
    """A decay for each direction needs both."""
    if not shared_decay and direction != "bidirectional":
        raise ValueError(f"shared_decay=False needs direction='bidirectional', got {direction!r}")


def check_rope(rope: bool, key_width: int, dim: int, num_heads: int) -> bool:
    """rope unchanged; queries are turned in two halves of pairs."""
    if rope and key_width % 4:
        raise ValueError(
            f"rope needs a key width divisible by 4, got {key_width} "
            f"(dim={dim}, num_heads={num_heads})"
        )
    return rope


def check_widths(key_width: int, value_width: int, num_heads: int) -> None:
    """What the operator takes on every device."""
    if key_width > MAX_KEY_WIDTH or value_width > MAX_VALUE_WIDTH:
        raise ValueError(
            f"num_heads={num_heads} leaves keys of {key_width} and values of {value_width} "
            f"channels a head; {MAX_KEY_WIDTH} and {MAX_VALUE_WIDTH} are supported: take more heads"
        )

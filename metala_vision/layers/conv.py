"""The short depthwise convolution in front of a token mixer, the same for every family.

B batch, Gh x Gw the token grid, N = Gh * Gw tokens in raster order, C width.
"""

import re
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from metala_vision.kernels.depthwise_conv import depthwise_conv_silu_op

CONVS = ("depthwise2d", "causal1d", "none")
ACCEPTED = (*CONVS, "causal1d(WIDTH)")


def causal_width(kind: str) -> int:
    """How many tokens a causal convolution sees: 4, or the WIDTH of "causal1d(WIDTH)"; 0 for the
    other kinds.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind in CONVS:
        return 4 if kind == "causal1d" else 0
    found = re.fullmatch(r"causal1d\(([1-9]\d*)\)", str(kind))
    if found is None:
        raise ValueError(f"conv={kind!r} is unknown; accepted: {', '.join(ACCEPTED)}")
    return int(found[1])


def on_gpu(x: Tensor) -> bool:
    """Whether a kernel takes the map: elsewhere the module is called, which exports and tracers
    know."""
    exporting = getattr(torch.compiler, "_is_exporting_flag", True)  # from torch 2.7 on
    return x.device.type == "cuda" and not exporting


def is_plain(module: nn.Module, taps: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Whether a module in a convolution's place is that convolution, which nobody changed, watches
    or offloads: its parameters alone pass by hooks, parametrizations, adapters (LoRA) and another
    `forward`."""
    if type(module) not in (nn.Conv1d, nn.Conv2d) or "forward" in module.__dict__:
        return False
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )
    if hooked:
        return False
    conv: Any = module
    ones = (1,) * len(taps)
    return (
        conv.kernel_size == taps
        and conv.padding == padding
        and conv.padding_mode == "zeros"
        and conv.stride == conv.dilation == ones
        and conv.groups == conv.in_channels == conv.out_channels
    )


class TokenConv(nn.Module):
    """Depthwise convolution and SiLU on a token map.

        depthwise2d: 3x3 on the grid, zeros outside
        causal1d: over the last four tokens in raster order (the next four with
            direction="backward", so that a mixer stays causal in its own direction)
        causal1d(WIDTH): the same over that many tokens
        none: the identity, without SiLU

    Source: causal1d of width 4 is that of MetaLA, arXiv 2411.10741, section 4, which takes
    width 2 for associative recall (appendix A5); depthwise2d that of ViG, arXiv 2405.18425. None of
    them has a bias; Mamba's, arXiv 2312.00752, does.

    Args:
        dim: C.
        kind: "depthwise2d", "causal1d", "causal1d(WIDTH)" or "none".
        direction: of the mixer behind it; "bidirectional" convolves as "forward" does.
        bias: add one.
    Raises:
        ValueError: for another kind.
    """

    def __init__(
        self,
        dim: int,
        kind: str = "depthwise2d",
        direction: str = "forward",
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        width = causal_width(kind)
        self.kind = kind
        self.before = width - 1  # zeros in front of the first token
        self.reverse = direction == "backward"
        self.conv: nn.Module = nn.Identity()
        if kind == "depthwise2d":
            self.conv = nn.Conv2d(
                dim, dim, 3, padding=1, groups=dim, bias=bias, device=device, dtype=dtype
            )
        elif width:
            self.conv = nn.Conv1d(
                dim, dim, width, groups=dim, bias=bias, device=device, dtype=dtype
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]."""
        if self.kind == "none":
            return x
        if torch.jit.is_scripting():
            return self.by_module(x)
        else:
            return self.by_operator(x) if self.fuses(x) else self.by_module(x)

    def fuses(self, x: Tensor) -> bool:
        """Whether one kernel convolves and takes SiLU."""
        if isinstance(x, torch.fx.Proxy) or not on_gpu(x):
            return False
        if self.kind == "depthwise2d":
            return is_plain(self.conv, (3, 3), (1, 1))
        return is_plain(self.conv, (self.before + 1,), (0,))

    def by_operator(self, x: Tensor) -> Tensor:
        """Convolution and SiLU at once, by the module's parameters."""
        conv: Any = self.conv
        weight, bias = conv.weight, conv.bias
        if self.kind == "depthwise2d":
            return depthwise_conv_silu_op(x, weight.squeeze(1), bias, 1, 1)
        sequence = x.flatten(1, 2).unsqueeze(1)
        if self.reverse:
            y = depthwise_conv_silu_op(sequence, weight.flip(2), bias, 0, 0)
        else:
            y = depthwise_conv_silu_op(sequence, weight, bias, 0, self.before)
        return y.reshape(x.shape)

    def by_module(self, x: Tensor) -> Tensor:
        """Through the module, whatever stands in its place."""
        if self.kind == "depthwise2d":
            return F.silu(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        tokens = x.flatten(1, 2).transpose(1, 2)  # [B, C, N]
        if self.reverse:
            tokens = torch.flip(tokens, [2])
        tokens = self.conv(F.pad(tokens, [self.before, 0]))
        if self.reverse:
            tokens = torch.flip(tokens, [2])
        return F.silu(tokens.transpose(1, 2).reshape(x.shape))

"""The residual block that every family shares."""

import math
from collections.abc import Callable
from typing import Any

from timm.layers import DropPath, GluMlp
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm residual block: a token mixer, then a gated linear unit, on maps [B, Gh, Gw, C].

        x = x + mixer(LayerNorm(x))
        x = x + (SiLU(x' W_1) * (x' W_2)) W_3,  x' = LayerNorm(x)

    Source: MetaLA, arXiv 2411.10741, equations A41 to A43, with the residual around the channel
    mixer that the printed A43 omits. The GLU is timm's, without biases.

    Args:
        dim: C.
        mixer_layer: called with (dim, device=, dtype=).
        mlp_ratio: hidden width of the GLU over C; 0 leaves out the channel mixer and its norm.
        proj_drop: dropout inside the GLU. drop_path: stochastic depth of both branches.
    """

    def __init__(
        self,
        dim: int,
        mixer_layer: Callable[..., nn.Module],
        mlp_ratio: float = 3.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = mixer_layer(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if not 0 <= mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be a number >= 0, got {mlp_ratio}")
        hidden = round(mlp_ratio * dim)
        self.norm2 = self.mlp = self.drop_path2 = None
        if mlp_ratio != 0:
            if hidden < 1:
                raise ValueError(f"mlp_ratio={mlp_ratio} leaves no hidden width of {dim} channels")
            self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
            self.mlp = GluMlp(
                dim,
                hidden_features=2 * hidden,  # timm counts both halves
                act_layer=nn.SiLU,
                gate_last=False,
                bias=False,
                drop=proj_drop,
                **dd,
            )
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def mix_channels(self, x: Tensor) -> Tensor:
        """The second branch with its residual."""
        if self.norm2 is not None and self.mlp is not None and self.drop_path2 is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def forward(self, x: Tensor, lower_bound: Tensor | None = None) -> Tensor:
        """x [B, Gh, Gw, C] -> [B, Gh, Gw, C]; lower_bound is for BoundedBlock."""
        return self.mix_channels(x + self.drop_path1(self.mixer(self.norm1(x))))


class BoundedBlock(Block):
    """Block whose mixer takes the least decay of its layer, which the backbone learns."""

    def forward(self, x: Tensor, lower_bound: Tensor | None = None) -> Tensor:
        """x [B, Gh, Gw, C], lower_bound [C] -> [B, Gh, Gw, C]."""
        if lower_bound is None:
            raise ValueError(
                "the block needs the lower bound of its layer, which the backbone gives: call the "
                "model; timm's feature_cls 'list', 'dict' and 'hook' do not, 'getter' and 'fx' do"
            )
        return self.mix_channels(x + self.drop_path1(self.mixer(self.norm1(x), lower_bound)))

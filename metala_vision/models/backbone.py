"""The isotropic backbone that every family shares, and timm's surface on it.

B batch, Gh x Gw the token grid, C width (embed_dim).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from metala_vision.layers import Block, SinCos2d, check_pos_embed, check_scans

jit_ignore: Any = torch.jit.ignore  # torch types the decorated function as a flag
POOLS = ("avg", "max", "avgmax", "catavgmax", "")


@register_notrace_function
def check_image(x: Tensor, in_chans: int, patch_h: int, patch_w: int) -> Tensor:
    """x unchanged, or a ValueError that says what the patch embedding accepts."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"expected images [B, {in_chans}, height, width], got {list(x.shape)}")
    if x.shape[2] < patch_h or x.shape[3] < patch_w:
        raise ValueError(
            f"images of {x.shape[2]}x{x.shape[3]} are smaller than a patch of {patch_h}x{patch_w}"
        )
    if x.shape[2] % patch_h != 0 or x.shape[3] % patch_w != 0:
        raise ValueError(
            f"image height and width must be multiples of the patch {patch_h}x{patch_w}, "
            f"got {x.shape[2]}x{x.shape[3]}"
        )
    return x


def check_pool(global_pool: str) -> str:
    """The pooling name unchanged, or a ValueError with the accepted ones."""
    if global_pool not in POOLS:
        accepted = ", ".join(repr(name) for name in POOLS)
        raise ValueError(f"global_pool={global_pool!r} is unknown; accepted: {accepted}")
    return global_pool


class Backbone(nn.Module):
    """Patch embedding, blocks, norm, pooling and classifier; features are maps [B, Gh, Gw, C].

    The token mixer is the only thing in which two families differ. Any image size works whose
    sides are multiples of the patch; `img_size` is what the model reports and is checked against
    the patch.

    Args:
        mixer_layer: makes a token mixer, called with (embed_dim, scans=, rope=, device=, dtype=);
            or one such for each layer.
        img_size: nominal image size, one number or (height, width).
        patch_size: side of a square patch, or (height, width).
        in_chans: image channels.
        num_classes: classifier outputs; 0 leaves the pooled features.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for the unpooled map.
        embed_dim: C.
        depth: number of blocks.
        mlp_ratio: hidden width of the channel mixer over C; 0 leaves it out.
        scans: orders in which the mixers visit the tokens, see layers.scan_order; one name, or
            several that the layers take in turn.
        split_heads: every layer uses all the orders, its heads divided among them.
        pos_embed: "none", "sincos2d" (added to the patches; embed_dim divisible by 4) or "rope2d"
            (queries and keys turned by position); for any size, without parameters.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout inside the channel mixers.
        drop_path_rate: stochastic depth, growing linearly to this value at the last block.
        block_layer: Block, or a class with its arguments.
    Raises:
        ValueError: for sizes that do not fit.
    """

    output_fmt = "NHWC"
    feature_dim = -1

    def __init__(
        self,
        mixer_layer: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]],
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 3.0,
        scans: str | Sequence[str] = "raster",
        split_heads: bool = False,
        pos_embed: str = "none",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        block_layer: type[Block] = Block,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        image: Any = to_2tuple(img_size)
        patch: Any = to_2tuple(patch_size)
        if min(patch) < 1 or any(i < p or i % p for i, p in zip(image, patch, strict=True)):
            raise ValueError(
                f"img_size={img_size} must be a multiple of patch_size={patch_size}, at least one"
            )
        if min(in_chans, depth, embed_dim) < 1 or num_classes < 0:
            raise ValueError(
                "in_chans, depth and embed_dim must be >= 1 and num_classes >= 0, got "
                f"in_chans={in_chans}, depth={depth}, embed_dim={embed_dim}, "
                f"num_classes={num_classes}"
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dim
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.patch_h, self.patch_w = patch

        self.patch_embed = PatchEmbed(
            img_size=image,
            patch_size=patch,
            in_chans=in_chans,
            embed_dim=embed_dim,
            output_fmt="NHWC",
            strict_img_size=False,
            **dd,
        )
        if check_pos_embed(pos_embed) == "sincos2d" and embed_dim % 4:
            raise ValueError(
                f"pos_embed='sincos2d' needs embed_dim divisible by 4, got {embed_dim}"
            )
        self.pos_embed = SinCos2d() if pos_embed == "sincos2d" else nn.Identity()
        scan_names = check_scans(scans)
        drop_path: Any = calculate_drop_path_rates(drop_path_rate, depth)
        mixer_layers = [mixer_layer] * depth if callable(mixer_layer) else list(mixer_layer)
        if len(mixer_layers) != depth:
            raise ValueError(f"mixer_layer holds {len(mixer_layers)} for depth={depth} layers")
        blocks = []
        for i in range(depth):
            names = scan_names if split_heads else (scan_names[i % len(scan_names)],)
            mixer = partial(mixer_layers[i], scans=names, rope=pos_embed == "rope2d")
            blocks.append(
                block_layer(embed_dim, mixer, mlp_ratio, proj_drop_rate, drop_path[i], **dd)
            )
        self.blocks = nn.Sequential(*blocks)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": max(patch), "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.head = ClassifierHead(
            embed_dim, num_classes, check_pool(global_pool), drop_rate, input_fmt="NHWC", **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights()

    @jit_ignore
    def init_weights(self) -> None:
        """Linear weights truncated normal with std 0.02, biases 0; the rest as its module does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                reset: Any = module.reset_parameters
                reset()

    @jit_ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters excluded from weight decay, beside biases and norms."""
        names = set()
        for name, module in self.named_modules():
            if name and hasattr(module, "no_weight_decay"):
                own: Any = module.no_weight_decay
                names |= {f"{name}.{parameter}" for parameter in own()}
        return names

    @jit_ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups by depth, for layer decay and freezing."""
        return {
            "stem": r"^patch_embed|^lower_bounds",
            "blocks": r"^blocks\.(\d+)"
            if coarse
            else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @jit_ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @jit_ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier on the model's device and dtype; the pooling is kept if None."""
        if global_pool is not None:
            check_pool(global_pool)
        if num_classes < 0:
            raise ValueError(f"num_classes must be >= 0, got {num_classes}")
        self.num_classes = num_classes
        dd: dict[str, Any] = get_device_dtype(self)
        self.head.reset(num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features behind several blocks.

        Args:
            x: images [B, in_chans, height, width].
            indices: of blocks; n stands for the last n, None for all.
            norm: apply the final norm to each.
            stop_early: leave out the blocks behind the last one asked for, and the final norm.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: leave out the final features.
        Returns:
            The final features [B, Gh, Gw, C] and a list of [B, C, Gh, Gw] (or NHWC), or the list.
        Raises:
            ValueError: for another output_fmt. AssertionError (timm's): for an index out of range.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt} is unknown; accepted: NCHW, NHWC")
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self._embed(x)
        bounds = self._lower_bounds()
        intermediates: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i <= last or not stop_early:
                bound = None if bounds is None else bounds[i]
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, bound)  # pyright: ignore[reportAssignmentType]
                else:
                    x = block(x, bound)
                if i in take:
                    y = self.norm(x) if norm else x
                    intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        if last == len(self.blocks) - 1 or not stop_early:
            x = self.norm(x)
        return x, intermediates

    @jit_ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features behind these blocks do not need; their indices, counted from 0.

        Every parameter that is left takes part in forward_features or, with the head, in forward.
        """
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = nn.Sequential(*list(self.blocks)[: last + 1])
        self.feature_info = self.feature_info[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def _lower_bounds(self) -> Tensor | None:
        """The least decay of every layer [depth, C], for blocks that take one."""
        return None

    def _embed(self, x: Tensor) -> Tensor:
        x = check_image(x, self.in_chans, self.patch_h, self.patch_w)
        return self.pos_embed(self.patch_embed(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] -> features [B, Gh, Gw, C], raster order."""
        x = self._embed(x)
        bounds = self._lower_bounds()
        for i, block in enumerate(self.blocks):
            bound = None if bounds is None else bounds[i]
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, bound)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x, bound)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, Gh, Gw, C] -> logits [B, num_classes], or the pooled features."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

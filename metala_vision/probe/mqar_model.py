"""The model of associative recall: two causal blocks of a family between an embedding and itself.

B examples, N tokens, C width, P questions an example.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metala_vision.kernels._fused import whole_operators
from metala_vision.layers.conv import causal_width
from metala_vision.models import FAMILIES, Backbone

POSITIONS = ("attention",)  # families whose causal form cannot tell the order of its past
# As published: MetaLA's of associative recall, arXiv 2411.10741 appendix A5; Mamba's, 2312.00752.
PUBLISHED_CONVS = {"metala": "causal1d(2)", "mamba": "causal1d"}


def conv_of(family: str, conv: str) -> str:
    """The convolution of a family: `conv`, or its own, none for most, if that is "published"."""
    return PUBLISHED_CONVS.get(family, "none") if conv == "published" else conv


class _AsMap(nn.Module):
    """In place of patches: [B, C, 1, N] -> [B, 1, N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def causal_backbone(
    family: str, length: int, dim: int, num_heads: int = 2, layers: int = 2, conv: str = "none",
    mlp_ratio: float | None = None, device: Any = None,
) -> Backbone:  # fmt: skip
    """A family's backbone on sequences instead of images: [B, C, 1, N] -> [B, 1, N, C].

    One row of N tokens of C channels, heard in raster order and forward; the family's own blocks,
    bounds, norms and initialisation, no positions, no classifier.

    Args:
        mlp_ratio: of the channel mixer; None is the family's own, 0 leaves it out.
    Raises:
        ValueError, TypeError: for a family without a causal form; for widths that do not fit.
    """
    if conv != "none" and not causal_width(conv):
        raise ValueError(f"conv={conv!r} hears of later tokens; a causal one is needed")
    options: dict[str, Any] = {} if mlp_ratio is None else {"mlp_ratio": mlp_ratio}
    backbone: Any = timm.create_model(
        f"{family}_nano", img_size=(1, length), patch_size=1, in_chans=dim, num_classes=0,
        global_pool="", embed_dim=dim, depth=layers, num_heads=num_heads, conv=conv,
        direction="forward", scans="raster", pos_embed="none", device=device, **options,
    )  # fmt: skip
    backbone.patch_embed = _AsMap()
    return backbone


def causal_mixers(families: tuple[str, ...] = FAMILIES) -> dict[str, str]:
    """Of each family, "" or why it has no causal form."""
    found = {}
    for family in families:
        try:
            causal_backbone(family, 16, 64, device="meta")
            found[family] = ""
        except (TypeError, ValueError) as error:
            found[family] = f"no causal form: {error}"
    return found


class RecallModel(nn.Module):
    """Answers of a causal sequence model at the places that are asked.

        x = dropout(E[tokens] (+ positions))
        logits = LayerNorm(blocks(x)) E^T                E [vocab, C], N(0, 0.02)

    Source: Zoology, arXiv 2312.04927, with the blocks of this package: pre-norm, a channel mixer
    behind every token mixer (MetaLA's setting, arXiv 2411.10741 section 6; Zoology has none).
    Differs: MetaLA and GLA have keys of C / 2 H channels (published: C / H); all linear weights
    start Xavier-uniform, several projections in one matrix as one. From N(0, 0.02), the backbone's,
    the logits of 64 channels are so near 0 that softmax attention does not find the small task in
    2,000 steps.

    Args:
        family: of models.FAMILIES. vocab, length, dim: of E and of the positions, which are
            learned, N(0, 0.02), for softmax attention alone.
        num_heads, layers, mlp_ratio: see causal_backbone. conv: see conv_of.
        dropout: of the embedding.
    Raises:
        ValueError: for widths that do not fit.
    """

    def __init__(
        self, family: str, vocab: int, length: int, dim: int, num_heads: int = 2, layers: int = 2,
        conv: str = "published", mlp_ratio: float | None = None, dropout: float = 0.1,
        device: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = causal_backbone(
            family, length, dim, num_heads, layers, conv_of(family, conv), mlp_ratio, device
        )
        self.embed = nn.Embedding(vocab, dim, device=device)
        self.positions = None
        if family in POSITIONS:
            self.positions = nn.Parameter(torch.empty(length, dim, device=device))
            nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.embed.weight, std=0.02)
        for module in self.backbone.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """tokens [B, N], asked [B, P], the places of the questions -> logits [B, P, vocab]."""
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions
        x = self.backbone.forward_features(self.dropout(x).transpose(1, 2).unsqueeze(2)).squeeze(1)
        x = x.gather(1, asked.unsqueeze(2).expand(-1, -1, x.shape[2]))
        return nn.functional.linear(x, self.embed.weight)

    def no_weight_decay(self) -> set[str]:
        """Parameters that AdamW should not decay although they are matrices."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}


def state_floats(model: RecallModel, length: int) -> int:
    """How many numbers a layer carries from one token to the next, the mean over layers.

    K V for each head of a linear attention (its row sum included), M for each of Mamba's channels,
    2 for each complex one; for softmax attention keys and values of all N tokens. The inputs that a
    causal convolution keeps are not counted.

    Args:
        model: on any device; on "meta" nothing is computed.
    """
    device = model.embed.weight.device
    tokens = torch.zeros((1, length), dtype=torch.int64, device=device)
    sizes: list[int] = []
    training = model.training
    model.eval()
    with torch.no_grad(), whole_operators(), _Products(sizes), _Recurrences(sizes):
        model(tokens, tokens[:, :1])
    model.train(training)
    return sum(sizes) // len(model.backbone.blocks)


class _Recurrences(TorchDispatchMode):
    """Notes the state of each operator that runs: one direction, one example."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "metala_vision::gated_linear_attention":
            q, v = args[0], args[1]
            self.sizes.append(q.shape[2] * q.shape[3] * v.shape[3])
        elif name == "metala_vision::selective_scan":
            u, A = args[0], args[2]
            self.sizes.append(u.shape[-1] * A.shape[-1])
        elif name == "metala_vision::linear_recurrence":
            b = args[0]
            self.sizes.append(b.shape[-2] * b.shape[-1])
        return func(*args, **(kwargs or {}))


class _Products(TorchFunctionMode):
    """Notes keys and values of each softmax attention that runs."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.sizes.append(args[1].numel() + args[2].numel())
        return func(*args, **(kwargs or {}))

"""How long each layer of a gated mixer remembers.

B batch, N tokens, H heads, D passes with a decay of their own, E channels of a head that decay by
themselves (K in gated linear attention, C in HGRN and LRU, channels times states in Mamba).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metala_vision.errors import UserError

from .maps import Call, recording

QUANTILES = (0.1, 0.5, 0.9)
MOST = 2**21  # values kept of a layer and pass
ACCEPTED = "models of MetaLA, GLA, HGRN, HGRN2, ReGLA, RetNet, LRU or Mamba"


@dataclass
class LayerMemory:
    """Half-lives in tokens of one layer and pass; infinite where nothing is forgotten.

    decay: "forward", "backward" or, where they share one, "both directions".
    quantiles: those of QUANTILES, over channels, tokens and images.
    heads: the median of each head; one where channels have no heads.
    """

    layer: int
    decay: str
    quantiles: list[float]
    heads: list[float]


def log_decays(call: Call) -> Tensor | None:
    """The log decays [D, B, N, H, E] that an operator was given; None if it has no decay.

    HGRN and LRU turn their states as well, which changes no half-life: H is 1 there, and in Mamba,
    whose decay of channel and state is exp(softplus(delta + bias) A).
    """
    given = call.inputs
    if call.operator == "linear_recurrence_op":
        return given["log_decay"].unsqueeze(2).unsqueeze(0)
    if call.operator == "selective_scan_op":
        delta, A, bias = given["delta"], given["A"], given["delta_bias"]
        delta = delta if delta.dim() == 4 else delta.unsqueeze(0)  # [D, B, N, channels]
        A = A if A.dim() == 3 else A.unsqueeze(0)  # [D, channels, states]
        if bias is not None:
            bias = bias if bias.dim() == 2 else bias.unsqueeze(0)
            delta = delta + bias[:, None, None]
        step = F.softplus(delta.double()).unsqueeze(4)
        return (step * A[:, None, None].double()).flatten(3).unsqueeze(3)
    if call.operator == "exponential_attention":  # of the gates: no state is forgotten by rescaling
        return given["log_decay"].unsqueeze(0)
    if call.operator != "gated_linear_attention_op":
        return None
    log_decay = given["log_decay"]
    if given["gate"] is not None:
        log_decay = F.logsigmoid(given["gate"].double()) / given["gate_divisor"]
    if log_decay is None:
        return None
    return log_decay if log_decay.dim() == 5 else log_decay.unsqueeze(0)


@torch.no_grad()
def memory_lengths(model: nn.Module, images: Tensor, name: str) -> list[LayerMemory]:
    """The half-life of every layer's memory, in tokens along the scan.

        half-life = ln 2 / -log alpha

    of one token's decay alpha in one channel: after so many tokens of that decay, half is left of
    a state. RetNet's head h forgets at ln 2 / -log(1 - 2^(-5 - h)): 22 tokens, 44, 88. Quantiles
    are values that occur, not means of two: the p-quantile is the least half-life that a share p
    does not exceed. Of a layer and pass with more than MOST values, tokens are drawn (seed 0):
    every n-th would be some columns of the image.

    Args:
        images: [B, C, height, width], preprocessed. name: of the model, for errors.
    Raises:
        UserError: naming the model, if it has no decay.
    """
    found: dict[tuple[int, int], list[tuple[Tensor, str]]] = {}
    generator = torch.Generator().manual_seed(0)
    for image in images:
        with recording(model) as calls:
            model(image.unsqueeze(0))
        of_image: dict[tuple[int, int], list[Tensor]] = {}
        direction: dict[tuple[int, int], str] = {}
        for call in calls:
            decays = log_decays(call)
            if decays is None:
                continue
            for d, own in enumerate(decays):
                N = own.shape[1]
                count = max(1, N // math.ceil(own.numel() * len(images) / MOST))
                drawn = torch.randperm(N, generator=generator)[:count] if count < N else slice(None)
                key = (call.layer, d)
                of_image.setdefault(key, []).append(own[:, drawn].float())
                direction[key] = _name(call.inputs["direction"], len(decays), d)
        for key, parts in of_image.items():  # the groups of channels of one layer
            found.setdefault(key, []).append((torch.cat(parts, 3), direction[key]))
    if not found:
        raise UserError(f"{name} has no decay, and so no half-life; accepted: {ACCEPTED}")
    result = []
    for (layer, _), parts in sorted(found.items()):
        half_life = math.log(2) / torch.cat([part for part, _ in parts]).abs()  # [B, N, H, E]
        result.append(
            LayerMemory(
                layer,
                parts[0][1],
                quantiles(half_life, QUANTILES),
                [quantiles(own, (0.5,))[0] for own in half_life.unbind(2)],
            )
        )
    return result


def _name(direction: str, D: int, d: int) -> str:
    if direction == "bidirectional":
        return ("forward", "backward")[d] if D == 2 else "both directions"
    return direction


def quantiles(values: Tensor, shares: tuple[float, ...]) -> list[float]:
    """For each share p, the least of the values that a share p of them does not exceed."""
    ordered = values.flatten().sort().values
    return [ordered[max(0, math.ceil(p * len(ordered) - 1e-9) - 1)].item() for p in shares]

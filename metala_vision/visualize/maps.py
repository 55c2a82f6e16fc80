"""What each token takes from each other: the attention maps that token mixers have implicitly.

B batch, N tokens, H heads, K key width and V value width per head, D passes, T tokens asked for,
Gh x Gw the token grid, P tokens before it that are no patches.

Every operator here is linear in its values, o_t = sum_s map[t, s] v_s: forward, for s visited not
after t,

    gated linear attention    map[t, s] = scale * q_t . (prod_{j=s+1..t} alpha_j * k_s)
    linear attention          map[t, s] = (q_t . k_s) / (sum_s q_t . k_s + 1e-6)
    softmax attention         map[t, s] = softmax_s(K^-0.5 q_t . k_s)
    EVA                       see eva_map.py

with k_s = 1 - alpha_s in MetaLA and HGRN2, and exponential features in place of q and k in ReGLA.
Backward visits the tokens in the reversed order. A map is of tokens in raster order, whatever the
order they are visited in, and stops before what follows the operator: self-augmentation, norm and
output gate.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metala_vision.errors import UserError
from metala_vision.layers import (
    TokenMixer,
    attention,
    eva_attention,
    gla,
    hgrn2,
    linear_attention,
    mamba,
    metala,
    regla,
    retnet,
)
from metala_vision.layers import rotation as elementwise
from metala_vision.layers.pos_embed import rope2d

from .eva_map import eva_map

# The modules that call an operator, and the names by which they call it.
CALLERS = (
    attention, eva_attention, gla, hgrn2, linear_attention, mamba, metala, regla, retnet,
    elementwise,
)  # fmt: skip
OPERATORS = (
    "eva_attention", "exponential_attention", "gated_linear_attention_op", "linear_recurrence_op",
    "normalised_linear_attention", "selective_scan_op", "softmax_attention",
)  # fmt: skip
PRODUCT = "scaled_dot_product_attention"
ACCEPTED = (
    "MetaLA, GLA, HGRN2, ReGLA, RetNet, EVA, linear or softmax attention, and timm's "
    "transformers whose tokens all attend to all"
)


@dataclass
class Call:
    """One call of an operator: its arguments by name, in the layer of that number, counted from 0.

    grid is None for a call outside of our mixers, whose tokens are P + Gh * Gw.
    """

    layer: int
    operator: str
    inputs: dict[str, Any]
    output: Tensor
    grid: tuple[int, int] | None


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Call]]:
    """The calls that the mixers of an eager model make of their operators, while the context lasts.

    Stands in for the operators in the modules that call them, in all threads, and takes away
    nothing: what a mixer gives to its operator, and gets from it, is noted. An operator within
    another is the outer one's matter. Of modules that are not ours, calls of
    scaled_dot_product_attention are noted.
    """
    calls: list[Call] = []
    mixers = [module for module in model.modules() if isinstance(module, TokenMixer)]
    place: tuple[int, tuple[int, int]] | None = None
    inside = 0

    def watched(name: str, function: Callable) -> Callable:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal inside
            inside += 1
            try:
                output = function(*args, **kwargs)
            finally:
                inside -= 1
            if not inside:
                layer, grid = place or (len(calls), None)
                inputs = dict(signature.bind(*args, **kwargs).arguments)
                calls.append(Call(layer, name, inputs, output, grid))
            return output

        return call

    def enter(layer: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal place
            place = (layer, (inputs[0].shape[1], inputs[0].shape[2]))

        return hook

    def leave(*_: object) -> None:
        nonlocal place
        place = None

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is F.scaled_dot_product_attention and not inside:
                return watched(PRODUCT, _product)(*args, **kwargs or {})
            return func(*args, **kwargs or {})

    with ExitStack() as undo:
        for module in CALLERS:
            for name in OPERATORS:
                function = getattr(module, name, None)
                if function is not None:
                    undo.callback(setattr, module, name, function)
                    setattr(module, name, watched(name, function))
        for layer, mixer in enumerate(mixers):
            undo.callback(mixer.register_forward_pre_hook(enter(layer)).remove)
            undo.callback(mixer.register_forward_hook(leave).remove)
        undo.enter_context(Products())
        yield calls


def _product(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """A built-in function has no signature; the last argument is not in every torch."""
    more = {"enable_gqa": True} if enable_gqa else {}
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more
    )


def feature_map(model: nn.Module, images: Tensor, name: str = "the model") -> Tensor:
    """What the last block leaves [B, C, Gh, Gw], before the final norm where the model has one.

    The sum over the channels of a LayerNorm is a constant where its weights are alike: a gradient
    of it would be rounding.

    Raises:
        UserError: naming the model, if it gives no map.
    """
    intermediates: Any = getattr(model, "forward_intermediates", None)
    found: Any = None
    if intermediates is not None:
        found = intermediates(images, indices=1, norm=False, intermediates_only=True)[-1]
    elif hasattr(model, "forward_features"):
        whole: Any = model
        found = whole.forward_features(images)
        if isinstance(found, Tensor) and str(getattr(model, "output_fmt", "NCHW")) == "NHWC":
            found = found.permute(0, 3, 1, 2)
    if not isinstance(found, Tensor) or found.dim() != 4:
        raise UserError(
            f"{name} gives no map of features; accepted: models with forward_intermediates, or "
            "with forward_features that returns a map"
        )
    return found


@torch.no_grad()
def record(model: nn.Module, images: Tensor, name: str) -> tuple[list[Call], tuple[int, int]]:
    """All calls of one pass over images [B, C, height, width], and the grid of the last map."""
    unfused: list[Any] = [m for m in model.modules() if getattr(m, "fused_attn", None) is False]
    for module in unfused:  # timm's: the same product, in one call that can be seen
        module.fused_attn = True
    try:
        with recording(model) as calls:
            found = feature_map(model, images, name)
    finally:
        for module in unfused:
            module.fused_attn = False
    return calls, (found.shape[2], found.shape[3])


def record_attention(
    model: nn.Module, images: Tensor, name: str
) -> tuple[list[Call], tuple[int, int], int]:
    """The calls that have an attention map, one for each layer; the grid, and P.

    Raises:
        UserError: naming the model, if it has a layer whose map is none of tokens over tokens.
    """
    calls, grid = record(model, images, name)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    tokens = prefix + grid[0] * grid[1]
    why = "" if calls else "none of its layers is of that kind"
    for call in calls:
        if call.operator in ("linear_recurrence_op", "selective_scan_op"):
            why = "its recurrence weighs each channel by itself"
        elif call.operator == PRODUCT:
            query, key = call.inputs["query"], call.inputs["key"]
            own = query.shape[0] == len(images) and query.shape[2] == tokens  # or it is of windows
            if not own or query.shape[:3] != key.shape[:3]:
                why = f"layer {call.layer} attends otherwise than all of {tokens} tokens to all"
            elif call.inputs.get("attn_mask") is not None:
                why = f"layer {call.layer} attends with a mask or a bias"
    blocks = getattr(model, "blocks", ())
    if calls and calls[0].grid is None and not why and len(calls) != len(blocks):
        why = f"{len(calls)} of its layers attend so, and it has other ones"
    if why:
        raise UserError(f"{name} has no attention map per head: {why}; accepted: {ACCEPTED}")
    return calls, grid, 0 if calls[0].grid else prefix


def attention_map(
    call: Call, tokens: Sequence[int] | None = None
) -> tuple[tuple[str, ...], Tensor]:
    """The map of a call that record_attention returned: the names of its passes, and their maps.

    Args:
        tokens: T rows of the map; None for all.
    Returns:
        map [D, B, H, T, N], float64. The sum over D times the values is the operator's output.
    """
    inputs = dict(call.inputs)
    if call.operator == PRODUCT:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
        scale = inputs.get("scale")
        factor = 1.0 if scale is None else scale * q.shape[3] ** 0.5
        direction = "forward" if inputs.get("is_causal") else "bidirectional"
        return _names(direction, 1), softmax_map(q.double() * factor, k, v, direction, None, tokens)
    function = {
        "eva_attention": eva_map,
        "exponential_attention": exponential_map,
        "gated_linear_attention_op": gated_map,
        "normalised_linear_attention": normalised_map,
        "softmax_attention": softmax_map,
    }[call.operator]
    weights = function(**inputs, tokens=tokens)
    return _names(inputs.get("direction", "bidirectional"), len(weights)), weights


def relative_weight(weights: Tensor) -> Tensor:
    """|map| over its mean: 1 is as much as every token alike would get. [H, Gh, Gw], by head.

    A recurrence's map has both signs and any sum, softmax attention's is positive and sums to 1:
    so both can be shown on one scale. What follows the operator norms each head.
    """
    size = weights.abs()
    return size / size.mean((1, 2), keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)


def _names(direction: str, D: int) -> tuple[str, ...]:
    if D == 2:
        return "forward", "backward"
    return ("all tokens",) if direction == "bidirectional" else (direction,)


def gated_map(
    q: Tensor, v: Tensor, k: Tensor | None, gate: Tensor | None, log_decay: Tensor | None,
    gate_divisor: float, scale: float, direction: str, order: Tensor | None,
    tokens: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """map[t, s] = scale * q_t . (prod_{j=s+1..t} alpha_j * k_s), one for each pass.

    The arguments are those of gated_linear_attention_op. A product of decays is the exponential of
    a sum of nothing but its own log decays, all <= 0: it neither overflows nor is it a difference
    of large numbers, and a decay of 0 is no trouble.

    Source: MetaLA, arXiv 2411.10741, equations 21 and 22, and GLA, arXiv 2312.06635, section 4.1,
    unrolled.

    Returns:
        [D, B, H, T, N], float64; D is 2, forward and backward, for direction="bidirectional".
    """
    B, N, H, K = q.shape
    if gate is not None:
        log_decay = F.logsigmoid(gate.double()) / gate_divisor
    if log_decay is None:
        log_decay = q.new_zeros(q.shape)
    log_alpha = log_decay.double().expand(2, B, N, H, K)
    key = -torch.expm1(log_alpha) if k is None else k.double().expand(2, B, N, H, K)
    visits = _visits(order, N, H, q.device)
    passes = {"forward": [0], "backward": [1], "bidirectional": [0, 1]}[direction]
    asked = range(N) if tokens is None else tokens
    weights = torch.zeros(len(passes), B, H, len(asked), N, dtype=torch.float64, device=q.device)
    for d, way in enumerate(passes):
        for h in range(H):
            visited = visits[h].flip(0) if way else visits[h]
            for row, t in enumerate(asked):
                # The tokens from t back to the first one visited
                past = visited[: int((visited == t).nonzero()) + 1].flip(0)
                decays = log_alpha[way, :, past, h]  # [B, tokens, K]
                since = torch.cat([decays.new_zeros(B, 1, K), decays[:, :-1].cumsum(1)], 1)
                taken = since.exp() * key[way, :, past, h] * q[:, t, h].double().unsqueeze(1)
                weights[d, :, h, row, past] = scale * taken.sum(2)
    return weights


def exponential_map(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, Gh: int, Gw: int, rope: bool, scale: float,
    direction: str, order: Tensor | None, tokens: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """gated_map of the features exp(q_t - max q_t) and exp(k_s - m), m that of the query's token.

    The arguments are those of layers.regla.exponential_attention. Source: ReGLA, arXiv 2502.01578.

    Returns:
        [D, B, H, T, N], float64; D is 2, forward and backward, for direction="bidirectional".
    """
    phi_q, phi_k, fall = regla.exponential_features(q.double(), k.double(), direction, order)
    if fall is not None:
        log_decay = log_decay + fall
    if rope:
        phi_q, phi_k = rope2d(phi_q, Gh, Gw), rope2d(phi_k, Gh, Gw)
    return gated_map(phi_q, v, phi_k, None, log_decay, 1.0, scale, direction, order, tokens)


def normalised_map(
    q: Tensor, k: Tensor, v: Tensor, turned_q: Tensor | None, turned_k: Tensor | None,
    direction: str, order: Tensor | None, tokens: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """map[t, s] = (turned_q_t . turned_k_s) / (sum_s q_t . k_s + 1e-6), over the tokens heard of.

    The arguments are those of layers.linear_attention.normalised_linear_attention, whose source
    and constant these are: the linear Transformer, arXiv 2006.16236, equations 4 to 12.

    Returns:
        [1, B, H, T, N], float64.
    """
    heard = _heard(q, direction, order, tokens)
    total = (_scores(q, k, tokens) * heard).sum(-1, keepdim=True)
    turned = q if turned_q is None else turned_q, k if turned_k is None else turned_k
    return (_scores(*turned, tokens) * heard / (total + 1e-6)).unsqueeze(0)


def softmax_map(
    q: Tensor, k: Tensor, v: Tensor, direction: str, order: Tensor | None,
    tokens: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """map[t, s] = softmax_s(K^-0.5 q_t . k_s) over the tokens heard of.

    The arguments are those of layers.attention.softmax_attention. Source: arXiv 1706.03762,
    equation 1.

    Returns:
        [1, B, H, T, N], float64.
    """
    scores = q.shape[3] ** -0.5 * _scores(q, k, tokens)
    heard = _heard(q, direction, order, tokens)
    return scores.masked_fill(~heard, float("-inf")).softmax(-1).unsqueeze(0)


def _scores(q: Tensor, k: Tensor, tokens: Sequence[int] | None) -> Tensor:
    """q_t . k_s, q and k [B, N, H, K] -> [B, H, T, N], float64."""
    asked = q if tokens is None else q[:, list(tokens)]
    return torch.einsum("bthk,bshk->bhts", asked.double(), k.double())


def _visits(order: Tensor | None, N: int, H: int, device: torch.device) -> Tensor:
    """The token that each head visits at each step, [H, N]."""
    return (torch.arange(N, device=device) if order is None else order.long()).expand(H, N)


def _heard(q: Tensor, direction: str, order: Tensor | None, tokens: Sequence[int] | None) -> Tensor:
    """Whether token t hears of token s, [H, T, N]."""
    _, N, H, _ = q.shape
    when = _visits(order, N, H, q.device).argsort(1)  # the step at which each token is visited
    mine = when.unsqueeze(2) if tokens is None else when[:, list(tokens)].unsqueeze(2)
    if direction == "bidirectional":
        return torch.ones_like(mine - when.unsqueeze(1), dtype=torch.bool)
    earlier = when.unsqueeze(1) <= mine
    return earlier if direction == "forward" else when.unsqueeze(1) >= mine

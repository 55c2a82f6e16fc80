"""How near a mixer's implicit attention map comes to a given one, by the size of its state.

    P[t, s] = Re sum_i q_ti k_si prod_{j=s+1..t} alpha_ji,  s <= t            of one head, one pass

N tokens, C width, K state of a head. Source of the question: MetaLA, arXiv 2411.10741, section 3:
a linear model should be able to be any softmax attention map.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metala_vision.layers import (
    GLAMixer,
    HGRN2Mixer,
    HGRNMixer,
    LinearAttentionMixer,
    LRUMixer,
    MambaMixer,
    MetaLAMixer,
    ReGLAMixer,
    RetNetMixer,
    UnifiedMixer,
    unified,
)
from metala_vision.layers.unified_instances import BOUNDED

from .conditions_rows import STEPS, TARGETS, Fit

TOKENS, WIDTH = 32, 64
RATES = (0.01, 0.03, 0.1)  # Adam's, side by side; the best counts

# The mixer of C channels whose heads have K real states (HGRN's and LRU's one is complex), or None
# where it has none such: RetNet's come in pairs.
Maker = Callable[[int, int, dict], nn.Module | None]
MIXERS: dict[str, Maker] = {
    "metala": lambda C, K, kw: MetaLAMixer(C, C // (2 * K), **kw),
    "gla": lambda C, K, kw: GLAMixer(C, C // (2 * K), **kw),
    "hgrn": lambda C, K, kw: HGRNMixer(C, **kw) if K == 1 else None,
    "hgrn2": lambda C, K, kw: HGRN2Mixer(C, C // K, **kw),
    "linear_attention": lambda C, K, kw: LinearAttentionMixer(C, C // K, **kw),
    "lru": lambda C, K, kw: LRUMixer(C, **kw) if K == 1 else None,
    "mamba": lambda C, K, kw: MambaMixer(C, expand=1, d_state=K, **kw),
    "regla": lambda C, K, kw: ReGLAMixer(C, C // K, **kw),
    "retnet": lambda C, K, kw: RetNetMixer(C, C // K, **kw) if K > 1 else None,
    "transnormer": lambda C, K, kw: (
        RetNetMixer(C, C // K, decay="transnormer", **kw) if K > 1 else None
    ),
}


def implicit_map(instance: UnifiedMixer, x: Tensor, head: int = -1) -> Tensor:
    """P [N, N] of one head in the forward pass over the map x [1, Gh, Gw, C], before norm and gate,
    the second accumulator of linear attention included.

    A product of decays is the exponential of a sum, so that a small one is no trouble; one of less
    than the least normal number counts as that.
    """
    q, k, _, alpha = (part[0, :, head] for part in instance.parts(x, 0))
    if alpha.is_complex():
        log_decay = alpha.log()
    else:
        log_decay = alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()
    total = log_decay.cumsum(0)  # [N, K]
    before = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril().unsqueeze(2)
    since = (total.unsqueeze(1) - total.unsqueeze(0)).masked_fill(~before, 0.0).exp()
    weights = ((q.unsqueeze(1) * k.unsqueeze(0)) * since * before).sum(2)
    weights = weights.real if weights.is_complex() else weights
    if instance.normaliser is not None:
        own = instance.normaliser
        z_q, z_k = (
            f(x, 0).unflatten(3, (instance.num_heads, -1)).flatten(1, 2)[0, :, head]
            for f in (own.query, own.key)
        )
        weights = weights / ((z_q @ z_k.T).tril().sum(1, keepdim=True) + own.eps)
    return weights


def rows_scaled(weights: Tensor, target: Tensor) -> Tensor:
    """Each row of `weights` [..., N, N] times the factor that brings it nearest to target's.

    A factor of a whole row is what a norm behind the read-out takes away, and what a query gives;
    every mixer is granted it, those without norm or query too. Of either sign, since a row that
    starts with the wrong one would have no way to the other.
    """
    dot = (weights * target).sum(-1, keepdim=True)
    size = weights.square().sum(-1, keepdim=True)
    return weights * (dot / size.clamp_min(1e-300))


def errors(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of scaled rows: the relative Frobenius norm, and the RMS over rows of each one's."""
    off = rows_scaled(weights, target) - target
    whole = off.square().sum((-2, -1)) / target.square().sum((-2, -1))
    rows = (off.square().sum(-1) / target.square().sum(-1)).mean(-1)
    return whole.sqrt(), rows.sqrt()


def softmax_target(seed: int, N: int = TOKENS) -> Tensor:
    """A causal softmax map [N, N] of twice standard normal logits."""
    logits = 2 * torch.randn(N, N, generator=torch.Generator().manual_seed(seed)).double()
    before = torch.ones(N, N, dtype=torch.bool).tril()
    return logits.masked_fill(~before, -math.inf).softmax(1)


def one_hot_tokens(C: int, N: int = TOKENS) -> Tensor:
    """A map [1, 1, N, C] in which token t is the unit vector t, so that a projection is a table."""
    return torch.eye(N, C, dtype=torch.float64)[None, None]


def fitted_mixer(name: str, K: int, C: int = WIDTH, seed: int = 0) -> nn.Module | None:
    """A mixer with K states a head, forward, without convolution; None where it has none such.

    Matrices start normal, in_proj with std 1 (the tokens are unit vectors), others with that of
    their width; vectors as they do in the mixer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"conv": "none", "direction": "forward", "dtype": torch.float64}
        mixer = MIXERS[name](C, K, options)
        if mixer is None:
            return None
        with torch.no_grad():
            for key, parameter in mixer.named_parameters():
                if parameter.dim() == 2 and key.endswith(("weight", "dt_weight")):
                    std = 1.0 if key == "in_proj.weight" else parameter.shape[1] ** -0.5
                    parameter.normal_(std=std)
    return mixer


def free_instance(mixer: Any, impl: str = "auto") -> UnifiedMixer:
    """The mixer in the unified form; one that has a least decay with 0, its first layer's."""
    width = mixer.out_proj.out_features
    bound = torch.zeros(width, dtype=torch.float64) if isinstance(mixer, BOUNDED) else None
    return unified(mixer, bound, impl)


class _Map(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.instance = free_instance(mixer)

    def forward(self, x: Tensor) -> Tensor:
        return implicit_map(self.instance, x)


def fit(
    name: str, K: int, targets: int = TARGETS, steps: int = STEPS, N: int = TOKENS, C: int = WIDTH
) -> Fit | None:
    """Train the mixer's own projections until the map of its last head is a random softmax map.

    All targets and learning rates at once, each with parameters of its own; Adam, in float64, with
    a cosine down to 0. None where the mixer has no such K.
    """
    members = []  # by target, then rate
    for seed in range(targets):
        for rate in RATES:
            mixer = fitted_mixer(name, K, C, seed)
            if mixer is None:
                return None
            members.append((rate, _Map(mixer)))
    base = members[0][1]
    x = one_hot_tokens(C, N)
    used = torch.autograd.grad(base(x).sum(), list(base.parameters()), allow_unused=True)
    names = [
        key for (key, _), gradient in zip(base.named_parameters(), used, strict=True)
        if gradient is not None
    ]  # fmt: skip
    own = [dict(module.named_parameters()) for _, module in members]
    groups = [
        {"params": [parameters[key] for key in names], "lr": rate}
        for (rate, _), parameters in zip(members, own, strict=True)
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    target = torch.stack([softmax_target(i // len(RATES), N) for i in range(len(members))])

    def maps() -> Tensor:
        stacked = {key: torch.stack([parameters[key] for parameters in own]) for key in names}
        return torch.func.vmap(lambda p: torch.func.functional_call(base, p, (x,)))(stacked)

    best = torch.full((2, len(members)), math.inf, dtype=torch.float64)
    for step in range(steps + 1):
        weights = maps()
        whole, rows = errors(weights, target)
        found = torch.stack([whole, rows]).detach()
        best = torch.where(found[0] < best[0], found, best)
        if step < steps:
            optimizer.zero_grad()
            whole.square().sum().backward()
            optimizer.step()
            schedule.step()
    by_rate = best.view(2, targets, len(RATES))
    chosen = by_rate[0].argmin(1, keepdim=True)
    error, rows = (part.gather(1, chosen).squeeze(1).tolist() for part in by_rate)
    return Fit(name, K, error, rows)

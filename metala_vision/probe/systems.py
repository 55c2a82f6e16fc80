"""The gated recurrences that are registered as models, as instances of the unified form, and what
can be counted and seen of one.

C width, H heads, K key width and V value width per head, E channels.
"""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

import metala_vision
from metala_vision.layers import TokenMixer, UnifiedMixer, unified
from metala_vision.layers.unified import FUNCTIONS, WAYS
from metala_vision.layers.unified_functions import Instance
from metala_vision.layers.unified_instances import INSTANCES

# Beside each family as it stands, options that make another row of the paper's table.
OPTIONS = {"transnormer": ("retnet", {"decay": "transnormer"})}
# A parameter that several functions use is counted for the first of these.
COUNTED = ("value", "query", "decay", "key", "gate")


@dataclass(frozen=True)
class System:
    """A token mixer of a model, and what it is in the unified form."""

    name: str
    mixer: TokenMixer
    functions: Instance
    instance: UnifiedMixer
    dim: int  # C

    def parts(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """q, k, v and alpha of each pass over the map x [B, Gh, Gw, C], before the convolution."""
        ways = WAYS[self.instance.direction]
        return [self.instance.parts(self.instance.conv(x), way) for way in ways]

    def forgetting(self, x: Tensor) -> list[Tensor]:
        """alpha of each pass, without what merely rescales a state: ReGLA's running maximum."""
        x, ways = self.instance.conv(x), WAYS[self.instance.direction]
        return [self.instance.alpha(x, way, self.functions.forgetting) for way in ways]


def systems_of(name: str, model: nn.Module) -> list[System]:
    """The mixers of a model that are gated recurrences, in double precision, with the bounds of
    their layers."""
    model = model.double()
    bounds = getattr(model, "_lower_bounds", lambda: None)()
    mixers: list[Any] = [module for module in model.modules() if type(module) in INSTANCES]
    found = []
    for i, mixer in enumerate(mixers):
        bound = None if bounds is None else bounds[i].detach()
        functions = INSTANCES[type(mixer)](mixer, bound)
        found.append(
            System(name, mixer, functions, unified(mixer, bound), mixer.out_proj.out_features)
        )
    return found


def registered(size: str = "tiny", names: list[str] | None = None) -> list[System]:
    """The last mixer of two layers of every registered recurrence, seed 0, by name."""
    found = []
    families = {family: (family, {}) for family in metala_vision.models.FAMILIES}
    for name, (family, options) in {**families, **OPTIONS}.items():
        if names is None or name in names:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = timm.create_model(f"{family}_{size}", depth=2, num_classes=0, **options)
            found += systems_of(name, model)[-1:]
    return found


def tokens(dim: int, side: int = 4, seed: int = 0) -> Tensor:
    """A map [1, side, side, C] of standard normal tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, side, side, dim, generator=generator, dtype=torch.float64)


@torch.no_grad()
def classes(system: System) -> tuple[bool, bool, bool]:
    """Whether there are a query, a key and a decay that the input changes.

    A key that is 1 - |alpha| is none of its own.
    """
    x, other = tokens(system.dim), tokens(system.dim, seed=1)
    (q, k, _, alpha), *_ = system.parts(x)
    (other_q, other_k, _, _), *_ = system.parts(other)
    tied = torch.allclose(k, (1 - alpha.abs()).to(k.dtype), rtol=1e-9, atol=1e-12)
    return (
        not torch.equal(q, other_q),
        not tied and not torch.equal(k, other_k),
        not torch.equal(system.forgetting(x)[0], system.forgetting(other)[0]),
    )


@torch.no_grad()
def widths(system: System) -> tuple[int, int, int, bool]:
    """H, K, V, and whether the states are complex."""
    (q, k, v, alpha), *_ = system.parts(tokens(system.dim))
    is_complex = any(part.is_complex() for part in (q, k, v, alpha))
    return q.shape[2], q.shape[3], v.shape[3], is_complex


def state_floats(system: System) -> int:
    """Real numbers that one pass keeps from token to token."""
    H, K, V, is_complex = widths(system)
    second = H * K if system.instance.normaliser is not None else 0
    return H * K * V * (2 if is_complex else 1) + second


def parameters(system: System) -> dict[str, int]:
    """How many parameters each of the functions has, "out" what is left, "conv" convolutions.

    Those that a function has are found by its gradient, value by value: a row of a projection that
    it does not use has none. One that several use is the first one's of COUNTED.
    """
    instance = system.instance
    own = dict(instance.named_parameters())
    convs = {name for name in own if "conv." in name}
    seen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in own.items()}
    found = dict.fromkeys(FUNCTIONS, 0)
    x = instance.conv(tokens(system.dim, seed=2)).detach()
    for name in COUNTED:
        for way in WAYS[instance.direction]:
            value = getattr(instance, name)(x, way)
            if not (isinstance(value, Tensor) and value.requires_grad):
                continue
            value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
            weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
            gradients = torch.autograd.grad(
                (value * weight).sum(), list(own.values()), allow_unused=True
            )
            for key, gradient in zip(own, gradients, strict=True):
                if gradient is not None and key not in convs:
                    used = (gradient != 0) & ~seen[key]
                    seen[key] |= used
                    found[name] += int(used.sum())
    conv = sum(own[name].numel() for name in convs)
    rest = sum(p.numel() for p in own.values()) - sum(found.values()) - conv
    return {**found, "out": rest, "conv": conv}

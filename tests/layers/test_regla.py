"""ReGLA's parts against their equations: the refined gate, its features and their maxima.

The whole mixer is in test_mixers.py.
"""

import math
from decimal import Decimal, localcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.export import Dim, export

from metala_vision.kernels.gated_linear_attention import gated_linear_attention
from metala_vision.layers import scan_order
from metala_vision.layers.regla import (
    exponential_attention,
    exponential_features,
    refined_log_decay,
    variance_scale,
)
from tests._numerics import SAME, normal, relative_rms

LOGITS = (-300.0, -100.0, -20.0, -3.0, -0.5, 0.0, 0.5, 3.0, 12.0, 20.0, 80.0)


def exact_log_decay(a, b):
    """log F and its derivatives by both logits, in 400 digits."""
    with localcontext(prec=400):
        g, r = (1 / (1 + (-Decimal(x)).exp()) for x in (a, b))
        refined = (1 - r) * g**2 + r * (1 - (1 - g) ** 2)
        by_g, by_r = 2 * ((1 - r) * g + r * (1 - g)), 1 - (1 - g) ** 2 - g**2
        slopes = by_g * g * (1 - g) / refined, by_r * r * (1 - r) / refined
        return [float(x) for x in (refined.ln(), *slopes)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_refined_gate_is_exact_for_any_logits_and_so_are_its_gradients(dtype):
    logits = torch.tensor([(a, b) for a in LOGITS for b in LOGITS], dtype=dtype)
    a, b = (x.clone().requires_grad_() for x in logits.unbind(1))
    log_decay = refined_log_decay(a, b)
    gradients = torch.autograd.grad(log_decay.sum(), (a, b))
    truth = torch.tensor([exact_log_decay(*pair) for pair in logits.tolist()], dtype=torch.float64)
    assert log_decay.dtype == dtype and (log_decay <= 0).all()
    precision = torch.finfo(dtype)
    for ours, exact in zip((log_decay.detach(), *gradients), truth.unbind(1), strict=True):
        assert torch.isfinite(ours).all()
        # An exponential makes eps of its exponent into a relative error, half by rounding it: the
        # sum of three up to 160, and as much again. Below the smallest normal number: finite alone.
        off = (ours.double() - exact).abs() - precision.tiny
        assert (off <= 200 * precision.eps * exact.abs()).all()


def test_gates_in_sixteen_bits_are_computed_in_float32():
    a, b = (4 * normal(50, seed=i, dtype=torch.bfloat16) for i in (0, 1))
    assert torch.equal(refined_log_decay(a, b), refined_log_decay(a.float(), b.float()))
    assert torch.equal(refined_log_decay(a, None), F.logsigmoid(a.float()))


def test_what_the_refinement_does_to_a_saturated_gate():
    """dF / dg = 2 ((1 - r) g + r (1 - g)) times what a plain gate passes to its logit: up to twice
    where r draws F back from the side at which g is, half that at r = 1 / 2, less on the other."""
    for bias, r, times in ((8, 0.05, 1.9), (-8, 0.95, 1.9), (8, 0.5, 1.0), (8, 0.95, 0.1)):
        a = torch.tensor(float(bias), dtype=torch.float64, requires_grad=True)
        b = torch.tensor(math.log(r / (1 - r)), dtype=torch.float64)
        (refined,) = torch.autograd.grad(refined_log_decay(a, b).exp(), a)
        (plain,) = torch.autograd.grad(refined_log_decay(a, None).exp(), a)
        g = torch.sigmoid(a).item()
        expected = 2 * ((1 - r) * g + r * (1 - g))
        assert (refined / plain).item() == pytest.approx(expected, rel=1e-9)
        assert (refined / plain).item() == pytest.approx(times, abs=1e-3)


def test_the_scale_gives_unit_variance():
    """Of M sums of K products e^(x + y): with z = x + y of variance 2 the excess kurtosis of e^z is
    e^8 + 2 e^6 + 3 e^4 - 6, that of a sum 1 / K of it; five deviations of the sample's variance."""
    K, M = 64, 100_000
    generator = torch.Generator().manual_seed(0)
    z = math.sqrt(2) * torch.randn(M, K, generator=generator)
    found = variance_scale(K) ** 2 * z.exp().sum(1).double().var().item()
    excess = (math.exp(8) + 2 * math.exp(6) + 3 * math.exp(4) - 6) / K
    bound = 5 * math.sqrt((excess + 2) / M)
    assert abs(found - 1) < bound
    # K e^2 e^2 in place of K e^2 (e^2 - 1), the least of the slips
    assert 1 - (math.e**2 - 1) / math.e**2 > bound


B, Gh, Gw, H, K = 2, 10, 9, 2, 4
N = Gh * Gw  # several chunks
ORDERS = {
    "raster": None,
    "spiral": scan_order("spiral", Gh, Gw),
    "by-head": torch.stack([scan_order(name, Gh, Gw) for name in ("column", "hilbert")]),
}


def some_inputs():
    q, k, v = (2 * normal(B, N, H, K, seed=i) for i in range(3))
    return q, k, v, refined_log_decay(normal(B, N, H, K, seed=3), normal(B, N, H, K, seed=4))


def attention(q, k, v, log_decay, direction, order):
    return exponential_attention(
        q, k, v, log_decay, Gh, Gw, False, variance_scale(K), direction, order
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_in_one_direction_no_token_hears_of_a_later_key(direction, order):
    q, k, v, log_decay = some_inputs()
    path = (torch.arange(N) if ORDERS[order] is None else ORDERS[order]).expand(H, N)
    path = path if direction == "forward" else path.flip(1)
    plain = attention(q, k, v, log_decay, direction, ORDERS[order])
    last = 50
    for h in range(H):  # a key that makes all others nothing beside it
        k[:, path[h, last], h] += 1000.0
    changed = attention(q, k, v, log_decay, direction, ORDERS[order])
    for h in range(H):
        before, after = path[h, :last], path[h, last:]
        # Chunks take another form for steep decays: some roundings of float64
        assert relative_rms(changed[:, before, h], plain[:, before, h]) < 1e-13
        assert (changed[:, after, h] - plain[:, after, h]).abs().amax((0, 2)).min() > 0
    # A maximum over all tokens would be heard of
    assert not torch.exp(k - k.amax((1, 3), keepdim=True))[:, path[0, :last], 0].any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_running_maximum_is_a_factor_of_a_tokens_output(direction, order):
    q, k, v, log_decay = some_inputs()
    k[1] *= 3
    ours = attention(q, k, v, log_decay, direction, ORDERS[order])
    _, _, fall = exponential_features(q, k, direction, ORDERS[order])
    assert fall is not None and (fall <= 0).all() and (fall < 0).sum() > 2 * B * H
    # By the maximum of all: both directions' keys
    _, phi_k, none = exponential_features(q, k, "bidirectional", ORDERS[order])
    assert none is None and phi_k.amax((1, 3)).eq(1).all()
    whole = attention(q, phi_k.log() - 7, v, log_decay, direction, ORDERS[order])
    torch.testing.assert_close(whole, ours, rtol=1e-10, atol=0)  # the same for k + a constant
    other = _globally(q, k, v, log_decay, direction, ORDERS[order])
    factor = (ours / other)[..., :1]
    assert (factor >= 1 - 1e-12).all() and factor.max() > 2
    assert relative_rms(ours, factor * other) < 1e-12
    # After the norm: 1 / sqrt(1 + eps / var) of each, at most eps / (2 var) apart.
    eps = 1e-5
    least = torch.minimum(ours.var(3, correction=0), other.var(3, correction=0))
    apart = (F.layer_norm(ours, [K], eps=eps) - F.layer_norm(other, [K], eps=eps)).norm(dim=3)
    assert (apart <= eps / (2 * least) * K**0.5 + 1e-9).all() and apart.max() > 1e-6


def _globally(q, k, v, log_decay, direction, order):
    """With the maximum over all tokens, in one direction: what the running one stands for."""
    phi_q, phi_k, _ = exponential_features(q, k, "bidirectional", order)
    return gated_linear_attention(
        phi_q, v, phi_k, log_decay=log_decay, scale=variance_scale(K), direction=direction,
        order=order,
    )  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "backward", "bidirectional"])
def test_keys_and_queries_of_any_size(direction):
    """exp(1e4) is beyond every type; decays of 1e-130 beside."""
    q, k, v, log_decay = (x.float() for x in some_inputs())
    q, k, log_decay = (x.requires_grad_() for x in (1e4 * q, 1e4 * k, 100 * log_decay))
    o = attention(q, k, v, log_decay, direction, None)
    gradients = torch.autograd.grad(o.square().sum(), (q, k, log_decay))
    assert all(torch.isfinite(x).all() for x in (o, *gradients)) and o.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_is_exported_for_any_size(direction):
    model = timm.create_model(
        "regla_nano", depth=2, embed_dim=32, num_heads=2, direction=direction, scans="snake"
    ).eval()
    sizes = ({0: Dim("b", max=64), 2: 8 * Dim("h", max=64), 3: 8 * Dim("w", max=64)},)
    exported = export(model, (torch.randn(2, 3, 64, 48),), dynamic_shapes=sizes, strict=False)
    for batch, height, width in ((2, 64, 64), (1, 72, 88), (1, 256, 256)):
        x = torch.randn(batch, 3, height, width)
        assert relative_rms(exported.module()(x), model(x)) <= SAME, (height, width)

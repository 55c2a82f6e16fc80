"""Implicit maps against the mixers, maps made by hand, and what a fit finds."""

import pytest
import torch
from torch import nn

from metala_vision.probe.conditions_rows import NEAR, TARGETS
from metala_vision.probe.fit import (
    MIXERS,
    TOKENS,
    WIDTH,
    errors,
    fit,
    fitted_mixer,
    free_instance,
    implicit_map,
    one_hot_tokens,
    softmax_target,
)
from tests._numerics import normal, relative_rms

# float64: hundreds of roundings of 1e-16, in sums of 32 terms
EXACT = 1e-13
FREE = ["gla", "mamba", "retnet", "transnormer"]  # query and key are free: any map, exactly


@pytest.mark.parametrize("name", MIXERS)
def test_the_implicit_map_is_what_the_mixer_does(name):
    """o of the last head is the map times its values; read off before norm and gate."""
    mixer = fitted_mixer(name, 2 if name not in ("hgrn", "lru") else 1)
    assert mixer is not None
    instance = free_instance(mixer, impl="loop")
    x = normal(1, 2, 5, WIDTH, seed=3)
    *_, v, _ = instance.parts(x, 0)
    seen = []

    class Seen(nn.Module):
        def forward(self, o):
            seen.append(o)
            return o.real.flatten(2)

    instance.norm, instance.out = Seen(), nn.Identity()
    instance.direct = instance.beside = None
    instance.replace(gate=lambda x, way: 1.0)
    own = v[0, :, -1]
    instance(x)
    if own.is_complex():  # the map of real values is the real part
        instance.replace(value=lambda x, way: v.real.reshape(1, 2, 5, -1))
        instance(x)
        own = own.real
    found = implicit_map(instance, x) @ own
    assert relative_rms(found.detach(), seen[-1][0, :, -1].real.detach()) <= EXACT


def hand_made(name, target):
    """The weights of a mixer of N states that make the map `target`, set by hand."""
    N, big = len(target), 40.0
    mixer = fitted_mixer(name, N)
    assert mixer is not None
    rows, unit = mixer.in_proj.weight, torch.eye(N, dtype=torch.float64)
    if mixer.in_proj.bias is not None:
        nn.init.zeros_(mixer.in_proj.bias)
    last = slice(-N, None)  # of a part's rows, those of the last head
    if name == "metala":
        # alpha = sigmoid^(1/16): to 1 where t != s, to e^-40 at token s; k = 1 - alpha
        rows[:N, :N] = target.T
        rows[N : 2 * N, :N] = 16 * big * (1 - 2 * unit)
    elif name == "hgrn2":
        # sigmoid(logit) is half the target, and the row factor 2
        rows[:WIDTH][last, :N] = torch.logit(target / 2).clamp_min(-big).T
        rows[WIDTH : 2 * WIDTH][last, :N] = big * (1 - 2 * unit)
    elif name == "linear_attention":
        # elu(log T) + 1 = T
        rows[:WIDTH][last, :N] = target.log().clamp_min(-big).T
        rows[WIDTH : 2 * WIDTH][last, :N] = big * (unit - 1)
    elif name == "regla":
        rows[:WIDTH][last, :N] = target.log().clamp_min(-big).T
        rows[WIDTH : 2 * WIDTH][last, :N] = big * (unit - 1)
        rows[3 * WIDTH :, :N] = big  # g, and with it F, is 1
    return mixer


@pytest.mark.parametrize("name", ["metala", "hgrn2", "linear_attention", "regla"])
@torch.no_grad()
def test_a_key_that_is_1_minus_alpha_is_any_map_of_as_many_tokens_as_states(name):
    x = one_hot_tokens(WIDTH)
    for seed in range(3):
        target = softmax_target(seed)
        mixer = hand_made(name, target)
        found = implicit_map(free_instance(mixer), x)
        assert errors(found, target)[0] < 1e-6


@pytest.mark.parametrize("name", FREE)
@torch.no_grad()
def test_a_free_query_over_any_keys_is_any_map_of_as_many_tokens_as_states(name):
    """The map is linear in the queries: those of each token are solved for."""
    mixer, target, x = fitted_mixer(name, TOKENS), softmax_target(0), one_hot_tokens(WIDTH)
    assert mixer is not None
    if name == "mamba":
        mixer.in_proj.weight[:WIDTH] = torch.eye(WIDTH)  # u = x
        mixer.ways[0].dt_bias.fill_(-10)  # short steps: decays near 1
        mixer.ways[0].dt_weight.zero_()
        queries = mixer.ways[0].x_proj.weight[-TOKENS:, :TOKENS]
    else:
        end = {"gla": TOKENS}.get(name, WIDTH)  # W_Q's last row, and so the last head's
        queries = mixer.in_proj.weight[end - TOKENS : end, :TOKENS]
    maps = []
    for i in range(TOKENS):
        queries.zero_()
        queries[i] = 1
        maps.append(implicit_map(free_instance(mixer), x))
    basis = torch.stack(maps, 2)  # [t, s, i]
    for t in range(TOKENS):
        heard = basis[t, : t + 1]
        queries[:, t] = torch.linalg.lstsq(heard, target[t, : t + 1, None], driver="gelsd")[0][:, 0]
    assert errors(implicit_map(free_instance(mixer), x), target)[0] < 1e-6


def least_error(target, rank):
    """Of any map whose lower left quarter has that rank (Eckart and Young): what the quarter's
    other singular values are, over the norm of the target. Factors of rows keep a rank."""
    quarter = target[TOKENS // 2 :, : TOKENS // 2]
    return (torch.linalg.svdvals(quarter)[rank:].norm() / target.norm()).item()


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_below_the_diagonal_a_map_has_the_rank_of_its_states(name):
    """P[t, s] with t in the second half and s in the first is a product through one state."""
    K = 1 if name in ("hgrn", "lru") else 4
    mixer = fitted_mixer(name, K)
    assert mixer is not None
    values = torch.linalg.svdvals(
        implicit_map(free_instance(mixer), one_hot_tokens(WIDTH))[TOKENS // 2 :, : TOKENS // 2]
    )
    rank = 2 if K == 1 else K  # a complex state is two real ones
    assert values[rank] <= EXACT * values[0]


def test_few_states_are_not_enough_for_any_mixer():
    """And so for HGRN and LRU, which have one complex state a channel, whatever is fitted."""
    for seed in range(TARGETS):
        target = softmax_target(seed)
        assert least_error(target, 2) > 5 * NEAR and least_error(target, 8) > NEAR
        assert least_error(target, 16) == 0
        # what is bounded is found: the best map of rank 2 in the quarter, the target elsewhere
        left, values, right = torch.linalg.svd(target[TOKENS // 2 :, : TOKENS // 2])
        best = target.clone()
        best[TOKENS // 2 :, : TOKENS // 2] = (left[:, :2] * values[:2]) @ right[:2]
        error = (best - target).norm() / target.norm()
        assert error.item() == pytest.approx(least_error(target, 2))
        assert errors(best, target)[0] <= error + EXACT


def test_a_factor_of_a_row_is_no_error():
    target = softmax_target(5)
    whole, rows = errors(target * normal(TOKENS, 1, seed=1), target)
    assert whole < EXACT and rows < EXACT
    # and what is one: a row that is something else, of 32
    other = target.clone()
    other[9, :10] = torch.linalg.svd(target[9:10, :10])[2][1]  # at a right angle to the row
    whole, rows = errors(other, target)
    assert whole == pytest.approx((target[9].norm() / target.norm()).item())
    assert rows == pytest.approx(32**-0.5)


def test_a_target_is_a_causal_softmax():
    target = softmax_target(0)
    assert torch.allclose(target.sum(1), torch.ones(TOKENS).double())
    assert torch.equal(target, target.tril()) and not torch.equal(target, softmax_target(1))


def test_a_fit_finds_more_with_more_states_and_steps():
    few, many = (fit("metala", K, targets=2, steps=60, N=8, C=16) for K in (1, 8))
    assert few is not None and many is not None
    assert max(many.error) < 0.15 < 0.3 < min(few.error) and len(many.error) == 2
    start = fit("metala", 8, targets=2, steps=1, N=8, C=16)
    assert start is not None and min(start.error) > 2 * max(many.error)
    assert fit("metala", 1, targets=2, steps=60, N=8, C=16) == few


@pytest.mark.parametrize(("name", "K"), [("retnet", 1), ("hgrn", 2), ("lru", 2)])
def test_a_state_that_a_mixer_does_not_have_is_none(name, K):
    assert fit(name, K, steps=1) is None

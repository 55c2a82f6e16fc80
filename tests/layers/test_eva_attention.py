"""EVA against its theory: where it is softmax attention, exactly or in expectation.

The names and units are those of layers/eva_attention.py, whose functions are tested here.
"""

import math

import pytest
import torch

from metala_vision.layers import AttentionMixer, EVAAttentionMixer
from metala_vision.layers.eva_attention import (
    control_variate_attention,
    group_values,
    log_feature,
    relative_bias,
)
from tests._numerics import SAME, normal, relative_rms

N, K, H, SCALE = 12, 8, 2, 8**-0.5
# float64: a score is off by some K roundings of 1.1e-16 times its size, up to 5, a weight by as
# much relatively, and sums of N terms by N roundings more
EXACT = 1e-14
DIFFERENT = 1e-3
NO = float("-inf")


def made(n=N):
    """q, k, v [1, 1, H, n, K]."""
    return [normal(1, 1, H, n, K, seed=i) for i in range(3)]


def softmax_attention(q, k, v, scale=SCALE):
    return (scale * q @ k.mT).softmax(-1) @ v


def estimate(q, k, v, seen, groups, key=None, weights=None, seed=9):
    """The function with one window of all tokens, whose i-th query sees those of seen[i] [N, N].

    groups: lists of as many tokens each; weights [N, groups] are added to their scores, -inf leaves
    one out; key: their keys, the mean if None. w is arbitrary.
    """
    index = torch.tensor(groups, dtype=torch.long).reshape(
        len(groups), len(groups[0]) if groups else 1
    )
    group_k, group_v = k[:, 0, :, index], v[:, 0, :, index]  # [1, H, NG, LG, K]
    key = group_k.mean(3) if key is None else key
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, NO)
    weights = torch.zeros(q.shape[3], len(groups), dtype=q.dtype) if weights is None else weights
    present = torch.ones(index.shape, dtype=torch.bool)
    w = 3 * normal(*key.shape, seed=seed)
    return control_variate_attention(
        q, k, v, bias, group_k, group_v, present, key, w, weights, SCALE
    )


ALL, NOTHING = torch.ones(N, N, dtype=torch.bool), torch.zeros(N, N, dtype=torch.bool)
SINGLE = [[i] for i in range(N)]


def test_every_token_exact_and_no_groups_is_softmax_attention():
    q, k, v = made()
    expected = softmax_attention(q, k, v)
    nobody = torch.full((N, 1), NO, dtype=q.dtype)
    assert relative_rms(estimate(q, k, v, ALL, [[0, 1]], weights=nobody), expected) <= EXACT
    assert relative_rms(estimate(q, k, v, ALL, []), expected) <= EXACT
    # not with one token less, nor with a group that counts tokens again
    less = ALL.clone()
    less[:, 3] = False
    assert relative_rms(estimate(q, k, v, less, []), expected) > DIFFERENT
    assert relative_rms(estimate(q, k, v, ALL, [[0, 1]]), expected) > DIFFERENT


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_groups_of_one_token_are_softmax_attention_for_any_w(share):
    """Of each query another part is exact, the rest in groups."""
    q, k, v = made()
    expected = softmax_attention(q, k, v)
    seen = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < share
    rest = torch.zeros(N, N, dtype=q.dtype).masked_fill(seen, NO)
    for seed in (1, 2):
        ours = estimate(q, k, v, seen, SINGLE, weights=rest, seed=seed)
        assert relative_rms(ours, expected) <= EXACT
    other_key = 1.1 * k[:, 0]
    assert relative_rms(estimate(q, k, v, seen, SINGLE, other_key, rest), expected) > DIFFERENT
    if share:  # tokens that count twice
        assert relative_rms(estimate(q, k, v, seen, SINGLE), expected) > DIFFERENT


@pytest.mark.parametrize("exact", [0, 4])
def test_groups_of_equal_keys_are_softmax_attention_with_the_log_of_their_size(exact):
    q, k, v = made()
    groups = [list(range(i, i + 4)) for i in range(exact, N, 4)]
    for group in groups:
        k[..., group, :] = k[..., group[:1], :]
    expected = softmax_attention(q, k, v)
    seen = NOTHING.clone()
    seen[:, :exact] = True
    counted = torch.full((N, len(groups)), math.log(4), dtype=q.dtype)
    for seed in (1, 2):
        ours = estimate(q, k, v, seen, groups, weights=counted, seed=seed)
        assert relative_rms(ours, expected) <= EXACT
    if exact:  # without exact tokens all groups are as large, and the logarithm cancels
        assert relative_rms(estimate(q, k, v, seen, groups), expected) > DIFFERENT
    unequal = k.clone()
    unequal[..., N - 1, :] += 0.5
    expected = softmax_attention(q, unequal, v)
    ours = estimate(q, unequal, v, seen, groups, weights=counted)
    assert relative_rms(ours, expected) > DIFFERENT


SAMPLES = 200_000


def products(scale_of_features, squares=True):
    """Mean over w of xi(s^0.5 q, w) xi(s^0.5 k, w); K^-0.5 q . k and the bound on the mean's error.

    Var[xi(q, w) xi(k, w)] = exp(2 q . k) (exp(|q + k|^2) - 1), and six deviations of a mean.
    """
    K = 4
    scale = K**-0.5
    q, k = (x / x.norm() for x in (normal(K, seed=3), normal(K, seed=3) + 0.5 * normal(K, seed=4)))
    w = normal(SAMPLES, K, seed=5) / scale_of_features**0.5
    logs = [log_feature(x, w, scale_of_features) for x in (q, k)]
    if not squares:
        logs = [
            y + scale_of_features * x.square().sum() / 2 for x, y in zip((q, k), logs, strict=True)
        ]
    exact = (scale * q @ k).exp()
    deviation = exact * ((scale * (q + k).square().sum()).exp() - 1).sqrt()
    return (logs[0] + logs[1]).exp().mean(), exact, 6 * deviation / SAMPLES**0.5


def test_random_features_are_unbiased():
    found, exact, bound = products(4**-0.5)
    assert abs(found - exact) <= bound


@pytest.mark.parametrize(("scale", "squares"), [(4.0**-1, True), (1.0, True), (4**-0.5, False)])
def test_a_wrong_feature_is_noticed(scale, squares):
    """q and k times K^-0.5 each or not at all, where K^-0.25 is right; |x|^2 / 2 left out."""
    found, exact, bound = products(scale, squares)
    assert abs(found - exact) > bound


def drawn(q, k, tokens, mean=1.0, deviation=1.0):
    """Samples of sum_m softmax_m(q . k_m) N(w; q + k_m, I) over some tokens, [SAMPLES, K]."""
    g = torch.Generator().manual_seed(int(tokens[0]))
    chosen = torch.multinomial((k[tokens] @ q).softmax(0), SAMPLES, True, generator=g)
    noise = torch.randn(SAMPLES, len(q), generator=g, dtype=q.dtype)
    return mean * (q + k[tokens][chosen]) + deviation * noise


@pytest.mark.parametrize(
    ("right", "wrong"), [(True, {}), (False, {"mean": 0.5}), (False, {"deviation": 0.3})]
)
def test_randomized_attention_is_softmax_attention_in_expectation(right, wrong):
    """One group of all tokens. Half the mean is the release's, whose w is no such sample."""
    q, k, v = normal(2, seed=1), 1.5 * normal(5, 2, seed=2), normal(5, 3, seed=3)
    expected = (k @ q).softmax(0) @ v
    w = drawn(q, k, list(range(5)), **wrong).reshape(SAMPLES, 1, 2)
    present = torch.ones(1, 5, dtype=torch.bool)
    found = group_values(k.reshape(1, 1, 5, 2), v.reshape(1, 1, 5, 3), w, present, 1.0)
    # beta is a mean of the v, so it deviates by half their range at most
    bound = 6 * (v.max(0).values - v.min(0).values) / 2 / SAMPLES**0.5
    assert ((found.mean((0, 1)) - expected).abs() <= bound).all() == right


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_control_variates_are_softmax_attention_in_expectation(weight):
    """Two exact tokens, two groups with w of their own mixtures and weights Z_c; not with 2 Z_c."""
    q, k, v = normal(2, seed=1), 1.5 * normal(8, 2, seed=2), normal(8, 2, seed=3)
    expected = (k @ q).softmax(0) @ v
    groups = torch.tensor([[2, 3, 4], [5, 6, 7]])
    w = torch.stack([drawn(q, k, group) for group in groups], 1).unsqueeze(1)  # [n, 1, NG, K]
    key = k[groups].mean(1)
    rest = (k[groups] @ q).logsumexp(1) - key @ q + math.log(weight)
    many = (SAMPLES, 1, 1)
    found = control_variate_attention(
        q.expand(*many, 1, 2), k[:2].expand(*many, 2, 2), v[:2].expand(*many, 2, 2),
        torch.zeros(1, 2, dtype=q.dtype), k[groups].expand(SAMPLES, 1, 2, 3, 2),
        v[groups].expand(SAMPLES, 1, 2, 3, 2), torch.ones(2, 3, dtype=torch.bool),
        key.expand(SAMPLES, 1, 2, 2), w, rest.expand(1, 2), 1.0,
    )  # fmt: skip
    bound = 6 * (v.max(0).values - v.min(0).values) / 2 / SAMPLES**0.5
    assert ((found.mean((0, 1, 2, 3)) - expected).abs() <= bound).all() == (weight == 1)


C, GRID = 16, (3, 5)


def module(identity=True, **options):
    """A mixer in training without relative bias, the keys of whose groups are their mean key."""
    mixer = EVAAttentionMixer(C, H, **options, dtype=torch.float64)
    with torch.no_grad():
        for i, parameter in enumerate(mixer.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=i))
        for parameter in (mixer.relative_bias, mixer.in_proj.bias, mixer.out_proj.bias):
            parameter.zero_()
        if identity:
            mixer.key_norm = torch.nn.Identity()
            mixer.key_proj.weight.copy_(torch.eye(C // H))
            mixer.key_proj.bias.zero_()
    return mixer


def off(mixer, shift=None):
    """How far the mixer is from softmax attention with the same weights, relatively."""
    if shift is not None:  # every key is this one
        with torch.no_grad():
            mixer.in_proj.weight[C : 2 * C] = 0
            mixer.in_proj.bias[C : 2 * C] = shift
    attention = AttentionMixer(C, H, dtype=torch.float64)
    names = ("in_proj.weight", "out_proj.weight", "conv.conv.weight")
    attention.load_state_dict({name: mixer.state_dict()[name] for name in names})
    x = normal(2, *GRID, C, seed=50)
    return relative_rms(mixer(x), attention(x))


def test_where_the_module_is_softmax_attention():
    """And the neighbouring cases in which it is not."""
    disjoint = {"exact_partition": True}
    single = {"landmarks": 15}
    assert off(module(window=5, landmarks=2, identity=False, **disjoint)) <= EXACT
    assert off(module(window=4, landmarks=2, identity=False, **disjoint)) > DIFFERENT
    assert off(module(window=5, landmarks=2, identity=False)) > DIFFERENT
    assert off(module(window=2, **single, **disjoint)) <= EXACT
    assert off(module(window=2, landmarks=3, **disjoint)) > DIFFERENT
    assert off(module(window=2, **single, identity=False, **disjoint)) > DIFFERENT
    assert off(module(window=2, **single)) > DIFFERENT
    key = normal(C, seed=7)  # equal keys; groups of four, two and one
    assert off(module(window=3, landmarks=3, count_tokens=True, **disjoint), key) <= EXACT
    assert off(module(window=3, landmarks=3, **disjoint), key) > DIFFERENT


def test_noise_is_drawn_in_training_alone():
    x = normal(1, *GRID, C, seed=50)
    noisy, quiet = (module(window=2, landmarks=2, noise=noise) for noise in (True, False))
    torch.manual_seed(0)
    first, second = noisy(x), noisy(x)
    torch.manual_seed(0)
    assert torch.equal(noisy(x), first) and relative_rms(first, second) > DIFFERENT
    expected = quiet(x)
    assert torch.equal(expected, quiet.eval()(x)) and torch.equal(expected, noisy.eval()(x))


def test_scans_change_nothing():
    x, options = normal(1, *GRID, C, seed=50), {"window": 2, "landmarks": 2, "noise": False}
    expected = module(**options)(x)
    for scans in ("hilbert", ("column", "spiral")):
        assert torch.equal(module(**options, scans=scans)(x), expected)


def test_every_offset_of_a_window_has_an_entry_of_its_own():
    entries = torch.arange(169.0).unsqueeze(1)
    bias = relative_bias(entries, 7)[0]
    assert len(bias.unique()) == 169
    assert bias[0, 0] == bias[48, 48] == 84 and bias[0, 48] == 0 and bias[48, 0] == 168


@pytest.mark.parametrize("options", [{}, {"exact_partition": True, "count_tokens": True}], ids=str)
def test_gradients(options):
    mixer = module(window=2, landmarks=2, noise=False, identity=False, **options)
    parameters = dict(mixer.named_parameters())
    x = normal(1, 3, 3, C, seed=50).requires_grad_()

    def call(x, *values):
        return torch.func.functional_call(mixer, dict(zip(parameters, values, strict=True)), x)

    inputs = (x, *parameters.values())
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_keys_in_16_bits(dtype):
    """|k|^2 / 2 beyond 65504, and a softmax in 16 bits, would show."""
    mixer = EVAAttentionMixer(C, 1, window=2, landmarks=2, conv="none").eval()
    x = torch.randn(1, *GRID, C)
    with torch.no_grad():
        mixer.in_proj.weight[C : 2 * C].mul_(300)
        mixer.in_proj.weight[:C].mul_(0.01)
        k = mixer.in_proj(x)[..., C : 2 * C]
        assert k.square().sum(3).max() > 2 * 65504
        mixer, x = mixer.to(dtype), x.to(dtype)
        expected = EVAAttentionMixer(C, 1, window=2, landmarks=2, conv="none").double().eval()
        expected.load_state_dict(mixer.state_dict())
        # keys rounded to 2^-9 of some hundred move the groups' weights: a few per cent in bfloat16
        limit = 0.2 if dtype == torch.bfloat16 else 0.05
        assert relative_rms(mixer(x), expected(x.double())) <= limit


def test_an_image_alone_is_as_in_a_batch():
    mixer = EVAAttentionMixer(C, H, window=2, landmarks=2).eval()
    x = torch.randn(3, *GRID, C)
    assert relative_rms(mixer(x[1:2]), mixer(x)[1:2]) <= SAME

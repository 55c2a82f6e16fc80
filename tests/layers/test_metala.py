"""The MetaLA mixer against the paper's equations, written out token by token in numpy."""

import copy

import numpy as np
import pytest
import torch

from metala_vision.kernels.gated_linear_attention import DIRECTIONS
from metala_vision.layers import Block, MetaLAMixer, TokenConv
from metala_vision.layers.conv import CONVS
from tests._numerics import normal, relative_rms
from tests.layers._by_hand import convolve, sigmoid, silu, turn


def metala_by_hand(
    x, p, H, conv, direction, self_aug=True, key="decay", tau=16.0, shared_decay=True, rope=False
):
    """Equations 21, 22, A23 to A38 of arXiv 2411.10741 for one image [Gh, Gw, C]."""
    Gh, Gw, C = x.shape
    N, K, V = Gh * Gw, C // (2 * H), C // H
    x = convolve(x, p.get("conv.conv.weight"), conv, direction).reshape(N, C)
    half = C // 2
    sizes = [half, half] + [half] * (not shared_decay) + [half] * (key == "projected") + [C, C]
    parts = [x @ w.T for w in np.split(p["in_proj.weight"], np.cumsum(sizes)[:-1])]
    q, v = parts[0], parts[-2]
    g = silu(parts[-1] + p["output_gate_bias"])
    alphas = {1: sigmoid(parts[1]) ** (1 / tau)}
    alphas[-1] = alphas[1] if shared_decay else sigmoid(parts[2]) ** (1 / tau)
    y = np.zeros((N, C))
    for h in range(H):
        keys, values = slice(h * K, h * K + K), slice(h * V, h * V + V)
        o = np.zeros((N, V))
        ways = {"forward": [1], "backward": [-1], "bidirectional": [1, -1]}[direction]
        for way in ways:
            S, alpha = np.zeros((K, V)), alphas[way]
            for t in range(N)[::way]:
                k_t = parts[-3][t, keys] if key == "projected" else 1 - alpha[t, keys]
                q_t = q[t, keys]
                if rope:
                    q_t, k_t = turn(q_t, t // Gw, t % Gw), turn(k_t, t // Gw, t % Gw)
                S = alpha[t, keys, None] * S + np.outer(k_t, v[t, values])
                o[t] += K**-0.5 * q_t @ S
        for t in range(N):
            if self_aug:
                k_t = parts[-3][t, keys] if key == "projected" else 1 - alphas[1][t, keys]
                own = q[t, keys] @ (p["w_aug"][h] * k_t)
                o[t] += sigmoid(own * v[t, values])
            o[t] = (o[t] - o[t].mean()) / np.sqrt(o[t].var() + 1e-5)
        y[:, values] = g[:, values] * o
    return (y @ p["out_proj.weight"].T).reshape(Gh, Gw, C)


def mixer_with_random_weights(dim, heads, conv, direction, **options):
    mixer = MetaLAMixer(dim, heads, conv, direction, **options, dtype=torch.float64)
    with torch.no_grad():
        for i, parameter in enumerate(mixer.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=i))
    return mixer


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (6, 7)], ids=str)
def test_the_mixer_is_the_papers_equations(grid, conv, direction):
    mixer = mixer_with_random_weights(12, 2, conv, direction)
    x = normal(2, *grid, 12, seed=50)
    weights = {name: p.numpy() for name, p in mixer.state_dict().items()}
    by_hand = np.stack([metala_by_hand(image, weights, 2, conv, direction) for image in x.numpy()])
    # float64; 1 - alpha by subtraction loses up to 1e-14 of a key near 0
    assert relative_rms(mixer(x).detach(), torch.from_numpy(by_hand)) <= 1e-11


@pytest.mark.parametrize(
    "options",
    [
        {"self_aug": False},
        {"key": "projected"},
        {"tau": 2.0},
        {"shared_decay": False},
        {"rope": True},
        {"rope": True, "key": "projected"},
        {"shared_decay": False, "key": "projected", "self_aug": False, "tau": 4.0},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_every_option_is_its_equation(options):
    mixer = mixer_with_random_weights(16, 2, "depthwise2d", "bidirectional", **options)
    x = normal(1, 3, 5, 16, seed=50)
    weights = {name: p.numpy() for name, p in mixer.state_dict().items()}
    by_hand = metala_by_hand(x[0].numpy(), weights, 2, "depthwise2d", "bidirectional", **options)
    assert relative_rms(mixer(x)[0].detach(), torch.from_numpy(by_hand)) <= 1e-11
    plain = metala_by_hand(
        x[0].numpy(),
        {**weights, "in_proj.weight": weights["in_proj.weight"][[*range(16), *range(-32, 0)]]}
        | ({"w_aug": np.ones((2, 4))} if "w_aug" not in weights else {}),
        2, "depthwise2d", "bidirectional",
    )  # fmt: skip
    assert relative_rms(torch.from_numpy(plain), torch.from_numpy(by_hand)) > 1e-3


@pytest.mark.parametrize("name", ["w_aug", "output_gate_bias", "in_proj.weight", "out_proj.weight"])
def test_the_written_out_equations_notice_a_wrong_parameter(name):
    mixer = mixer_with_random_weights(12, 2, "depthwise2d", "bidirectional")
    x = normal(1, 3, 4, 12, seed=50)
    weights = {key: p.numpy().copy() for key, p in mixer.state_dict().items()}
    weights[name].flat[0] += 0.1
    by_hand = metala_by_hand(x[0].numpy(), weights, 2, "depthwise2d", "bidirectional")
    assert relative_rms(mixer(x)[0].detach(), torch.from_numpy(by_hand)) > 1e-6


@pytest.mark.parametrize("conv", ["causal1d", "none"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_sees_only_its_past(direction, conv):
    mixer = mixer_with_random_weights(8, 1, conv, direction)
    x = normal(1, 4, 5, 8, seed=1).requires_grad_()
    token = 11
    mixer(x).flatten(1, 2)[0, token].sum().backward()
    seen = x.grad.flatten(1, 2)[0].abs().sum(1) > 0
    expected = torch.arange(20) <= token if direction == "forward" else torch.arange(20) >= token
    assert torch.equal(seen, expected)


def test_backward_is_forward_on_the_flipped_tokens():
    for conv in ("causal1d", "none"):
        forward = mixer_with_random_weights(8, 1, conv, "forward")
        backward = mixer_with_random_weights(8, 1, conv, "backward")
        x = normal(1, 3, 5, 8, seed=1)
        assert relative_rms(backward(x), forward(x.flip(1, 2)).flip(1, 2)) <= 1e-13


def test_self_augmentation_changes_nothing_at_the_start_but_learns():
    mixer = MetaLAMixer(12, 2, dtype=torch.float64)
    x = normal(1, 3, 3, 12)
    y = mixer(x)
    y.sum().backward()
    assert mixer.w_aug.grad.abs().max() > 0
    with torch.no_grad():
        mixer.w_aug += 1.0
        assert relative_rms(mixer(x), y) > 1e-6
        mixer.w_aug.zero_()
    mixer.w_aug = None
    assert torch.equal(mixer(x), y)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)])
@pytest.mark.parametrize("dim", [128, 192])
def test_sixteen_bits_keep_the_signal_of_a_fresh_mixer(dim, dtype, limit):
    """About five 16-bit roundings (2^-9 or 2^-12 each) follow one another, and the norm's own.

    A fresh mixer is the hard case: its recurrence starts near 1e-3, and the norm amplifies it.
    """
    torch.manual_seed(0)
    mixer = MetaLAMixer(dim, dim // 64)
    for weight in (mixer.in_proj.weight, mixer.out_proj.weight):
        torch.nn.init.trunc_normal_(weight, std=0.02)
    x = normal(2, 8, 8, dim, dtype=torch.float32)
    exact = copy.deepcopy(mixer).double()
    exact(x.double()).square().sum().backward()
    with torch.autocast("cpu", dtype):
        y = mixer(x)
    y.float().square().sum().backward()
    assert relative_rms(y, exact(x.double())) <= limit
    error = relative_rms(mixer.in_proj.weight.grad, exact.in_proj.weight.grad)
    assert error <= 2 * limit  # forward and backward each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, r"dim=12 is not divisible by 2 \* num_heads=10"),
        ({"conv": "3x3"}, "conv='3x3' is unknown; accepted: depthwise2d, causal1d, none"),
        ({"direction": "up"}, "direction='up' is unknown; accepted: forward, backward"),
        ({"key": "hash"}, "key='hash' is unknown; accepted: decay, projected"),
        ({"tau": 0.0}, r"tau must be > 0, got 0\.0"),
        (
            {"shared_decay": False, "direction": "forward"},
            "shared_decay=False needs direction='bidirectional', got 'forward'",
        ),
        ({"rope": True}, "rope needs a key width divisible by 4, got 3"),
        ({"rope": True, "shared_decay": False}, "needs key='projected', got key='decay'"),
    ],
)
def test_a_bad_option_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MetaLAMixer(12, **{"num_heads": 2, **arguments})


def test_conv_none_is_the_identity():
    x = normal(1, 2, 2, 4)
    assert torch.equal(TokenConv(4, "none")(x), x)


def test_the_block_is_two_pre_norm_residuals():
    torch.manual_seed(0)
    block = Block(
        8, lambda dim, **dd: MetaLAMixer(dim, 1, **dd), mlp_ratio=2.0, dtype=torch.float64
    )
    x = normal(2, 3, 3, 8)
    norm = torch.nn.functional.layer_norm
    y = x + block.mixer(norm(x, (8,), eps=1e-6))
    hidden, gated = (norm(y, (8,), eps=1e-6) @ block.mlp.fc1.weight.T).chunk(2, dim=-1)
    silu = torch.nn.functional.silu(hidden)
    assert block.mlp.fc1.weight.shape == (32, 8)
    assert relative_rms(block(x), y + (silu * gated) @ block.mlp.fc2.weight.T) <= 1e-14

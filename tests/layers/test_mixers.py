"""Every comparator's mixer against its published equations, written out token by token in numpy."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from metala_vision.kernels.gated_linear_attention import DIRECTIONS
from metala_vision.layers import (
    AttentionMixer,
    EVAAttentionMixer,
    GLAMixer,
    HGRN2Mixer,
    HGRNMixer,
    LinearAttentionMixer,
    LowerBounds,
    LRUMixer,
    MambaMixer,
    ReGLAMixer,
    RetNetMixer,
    scan_order,
)
from metala_vision.layers.conv import CONVS
from metala_vision.layers.lower_bound import bounded_log_decay
from metala_vision.layers.retnet import retention_log_decay
from tests._numerics import SAME, normal, relative_rms
from tests.layers import _by_hand, _eva_by_hand

C, H = 16, 2
MIXERS = {
    AttentionMixer: _by_hand.attention,
    EVAAttentionMixer: _eva_by_hand.eva,
    GLAMixer: _by_hand.gla,
    HGRN2Mixer: _by_hand.hgrn2,
    HGRNMixer: _by_hand.hgrn,
    LinearAttentionMixer: _by_hand.linear_attention,
    LRUMixer: _by_hand.lru,
    MambaMixer: _by_hand.mamba,
    ReGLAMixer: _by_hand.regla,
    RetNetMixer: _by_hand.retnet,
}
# One that hears of all tokens, in one direction only: its refusal of the others is a wrong option
ONE_WAY = (EVAAttentionMixer,)
SMALL = {EVAAttentionMixer: {"window": 2, "landmarks": 2}}  # more than one group, of several tokens
WITH_QUERIES = [m for m in MIXERS if m not in (HGRNMixer, LRUMixer, MambaMixer)]
# float64, sums of some dozen terms; 1 - f by subtraction loses up to 1e-14 of a key near 0
EXACT = 1e-11


def made(mixer_cls, **options):
    """A mixer with random weights, and its weights by name."""
    options = {**SMALL.get(mixer_cls, {}), **options}
    mixer = mixer_cls(C, H, **options, dtype=torch.float64).eval()
    with torch.no_grad():
        for i, parameter in enumerate(mixer.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=i))
    return mixer, {name: p.numpy() for name, p in mixer.state_dict().items()}


def visits(Gh, Gw, scans=("raster",)):
    """The sequence of tokens, for each head."""
    orders = [scan_order(name, Gh, Gw).tolist() for name in scans]
    return [orders[h * len(orders) // H] for h in range(H)]


def ways(mixers=MIXERS, directions=DIRECTIONS):
    """Every mixer with every direction that it takes."""
    return [(m, d) for m in mixers for d in directions if m not in ONE_WAY or d == DIRECTIONS[2]]


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("grid", [(1, 1), (3, 4)], ids=str)
@pytest.mark.parametrize(("mixer_cls", "direction"), ways())
def test_a_mixer_is_its_equations(mixer_cls, grid, conv, direction):
    mixer, weights = made(mixer_cls, conv=conv, direction=direction)
    x = normal(2, *grid, C, seed=50)
    by_hand = [
        MIXERS[mixer_cls](image, weights, H, conv, direction, visits(*grid)) for image in x.numpy()
    ]
    assert relative_rms(mixer(x).detach(), torch.from_numpy(np.stack(by_hand))) <= EXACT


@pytest.mark.parametrize("conv", ["causal1d(2)", "causal1d(5)"])
@pytest.mark.parametrize(("mixer_cls", "direction"), ways([GLAMixer, MambaMixer]))
def test_a_causal_convolution_of_any_width_is_its_equation(mixer_cls, direction, conv):
    mixer, weights = made(mixer_cls, conv=conv, direction=direction)
    x = normal(1, 3, 4, C, seed=50)
    by_hand, other = (
        torch.from_numpy(MIXERS[mixer_cls](x[0].numpy(), weights, H, name, direction, visits(3, 4)))
        for name in (conv, "causal1d(2)" if conv == "causal1d(5)" else "none")
    )
    ours = mixer(x)[0].detach()
    assert relative_rms(ours, by_hand) <= EXACT
    assert relative_rms(ours, other) > 1e-3  # another width: something else


@pytest.mark.parametrize("scans", [("snake",), ("column", "spiral")], ids=str)
@pytest.mark.parametrize(("mixer_cls", "direction"), ways())
def test_along_any_scan(mixer_cls, scans, direction):
    mixer, weights = made(mixer_cls, scans=scans, direction=direction)
    x = normal(1, 3, 5, C, seed=50)
    by_hand = MIXERS[mixer_cls](
        x[0].numpy(), weights, H, "depthwise2d", direction, visits(3, 5, scans)
    )
    assert relative_rms(mixer(x)[0].detach(), torch.from_numpy(by_hand)) <= EXACT


GAMMA = np.linspace(0, 0.9, C)
OPTIONS = [
    (GLAMixer, {"shared_decay": False}, {"shared_decay": False}),
    (GLAMixer, {"average": True, "norm": "rms"}, {"average": True, "kind": "rms"}),
    (RetNetMixer, {"value_ratio": 2, "norm": "rms"}, {"ratio": 2, "kind": "rms"}),
    (RetNetMixer, {"rotary": "none"}, {"rotary": False}),
    (
        RetNetMixer,
        {"decay": "transnormer", "layer": 1, "depth": 3},
        {"gammas": [np.exp(-(2.0 ** (-8 * h / H)) * (1 - 1 / 2 + 1e-5)) for h in (1, 2)]},
    ),
    (LinearAttentionMixer, {"feature_map": "relu"}, {"kind": "relu"}),
    (ReGLAMixer, {"refine": False}, {}),
    (EVAAttentionMixer, {"exact_partition": True}, {"disjoint": True}),
    (EVAAttentionMixer, {"count_tokens": True}, {"counted": True}),
    (
        EVAAttentionMixer,
        {"exact_partition": True, "count_tokens": True, "window": 3, "landmarks": 3},
        {"disjoint": True, "counted": True, "window": 3, "landmarks": 3},
    ),
    (MambaMixer, {"average": False}, {"average": False}),
    (MambaMixer, {"shared_parameters": True}, {}),
    (MambaMixer, {"expand": 1, "d_state": 5, "dt_rank": 3}, {}),
]


@pytest.mark.parametrize(("mixer_cls", "options", "by_hand"), OPTIONS, ids=str)
def test_every_option_is_its_equation(mixer_cls, options, by_hand):
    mixer, weights = made(mixer_cls, **options)
    x = normal(1, 3, 4, C, seed=50)

    def equations(**changes):
        return torch.from_numpy(
            MIXERS[mixer_cls](
                x[0].numpy(), weights, H, "depthwise2d", "bidirectional", visits(3, 4), **changes
            )
        )

    ours = mixer(x)[0].detach()
    assert relative_rms(ours, equations(**by_hand)) <= EXACT
    other_sizes = {"ratio", "window"} & set(by_hand)  # of weights
    if by_hand and not other_sizes and by_hand != {"shared_decay": False}:
        assert relative_rms(ours, equations()) > 1e-3  # without the option: something else


@pytest.mark.parametrize("mixer_cls", [HGRNMixer, HGRN2Mixer])
def test_a_lower_bound_is_its_equation(mixer_cls):
    mixer, weights = made(mixer_cls)
    x = normal(1, 3, 4, C, seed=50)
    expected = MIXERS[mixer_cls](
        x[0].numpy(), weights, H, "depthwise2d", "bidirectional", visits(3, 4), GAMMA
    )
    ours = mixer(x, torch.from_numpy(GAMMA))[0].detach()
    assert relative_rms(ours, torch.from_numpy(expected)) <= EXACT
    assert relative_rms(mixer(x)[0].detach(), torch.from_numpy(expected)) > 1e-3


@pytest.mark.parametrize("mixer_cls", MIXERS)
def test_the_written_out_equations_notice_a_wrong_parameter(mixer_cls):
    mixer, weights = made(mixer_cls)
    x = normal(1, 3, 4, C, seed=50)
    ours = mixer(x)[0].detach()
    for name, value in weights.items():
        changed = {**weights, name: value + 0.1 * normal(*value.shape, seed=99).numpy()}
        by_hand = MIXERS[mixer_cls](
            x[0].numpy(), changed, H, "depthwise2d", "bidirectional", visits(3, 4)
        )
        assert relative_rms(ours, torch.from_numpy(by_hand)) > 1e-4, name


@pytest.mark.parametrize(
    ("mixer_cls", "direction"), ways(WITH_QUERIES, ["forward", "bidirectional"])
)
def test_rope_turns_queries_and_keys_by_row_and_column(mixer_cls, direction):
    mixer, weights = made(mixer_cls, rope=True, direction=direction)
    x = normal(1, 3, 4, C, seed=50)
    arguments = (x[0].numpy(), weights, H, "depthwise2d", direction, visits(3, 4))
    ours = mixer(x)[0].detach()
    turned, plain = (
        torch.from_numpy(MIXERS[mixer_cls](*arguments, rope=rope)) for rope in (True, False)
    )
    assert relative_rms(ours, turned) <= EXACT
    assert relative_rms(ours, plain) > 1e-4


@pytest.mark.parametrize("autocast", [False, True])
def test_small_features_of_linear_attention_keep_their_size(autocast):
    """elu(-9) + 1 in 16 bits is 0, and with it every weight."""
    mixer = LinearAttentionMixer(C, H, conv="none")
    with torch.no_grad():
        x = 1 + 0.1 * torch.randn(1, 3, 3, C)
        mixer.in_proj.weight[: 2 * C].uniform_(-0.6, -0.5)
        q, _, _ = mixer.in_proj(x).chunk(3, 3)
        assert q.max() < -7
        expected = copy.deepcopy(mixer).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = mixer(x)
    assert relative_rms(ours, expected) <= (2e-2 if autocast else 1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_script_of_linear_attention_does_not_overflow_16_bits():
    torch.manual_seed(0)
    mixer, x = LinearAttentionMixer(64, 1, conv="none").eval(), 4 * torch.randn(1, 32, 32, 64)
    with torch.no_grad():
        expected = mixer(x)
        with torch.autocast("cpu", torch.float16):
            assert relative_rms(torch.jit.script(mixer)(x), expected) <= 1e-2


@pytest.mark.parametrize("mixer_cls", MIXERS)
def test_a_pass_of_fake_tensors_leaves_nothing_behind(mixer_cls):
    way = "bidirectional" if mixer_cls in ONE_WAY else "forward"
    mixer, x = mixer_cls(24, 3, scans="spiral", direction=way), torch.randn(1, 3, 7, 24)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        mixer(fake.from_tensor(x))
    assert torch.isfinite(mixer(x)).all()


def test_lower_bounds_grow_from_zero_to_below_one():
    bounds = LowerBounds(5, 3)
    with torch.no_grad():
        bounds.weight.copy_(normal(5, 3))
    gamma = bounds()
    assert torch.equal(gamma[0], torch.zeros(3))
    assert (gamma[1:] > gamma[:-1]).all() and (gamma < 1).all()
    share = torch.softmax(bounds.weight, 0)
    assert relative_rms(gamma[3], share[1] + share[2] + share[3]) <= SAME
    bounds.reset_parameters()
    assert torch.allclose(bounds()[:, 0], torch.arange(5) / 5)


@pytest.mark.parametrize("gamma", [0.0, 1e-6, 0.5, 0.99])
def test_a_bounded_decay_is_exact_and_its_gradient_finite(gamma):
    gate = torch.tensor([-300.0, -100, -20, -3, 0, 3, 20, 80], requires_grad=True)
    bound = torch.full((8,), gamma, requires_grad=True)
    log_decay = bounded_log_decay(gate, bound)
    lost = (1 - bound.detach().double()) * torch.sigmoid(-gate.detach().double())
    ours = log_decay.detach().double()
    assert (ours.exp() - (1 - lost)).abs().max() <= 2 * 2.0**-24
    long = lost < 0.5
    exact = torch.log1p(-lost[long])
    assert ((ours[long] - exact) / exact).abs().max() <= 8 * 2.0**-24
    assert (log_decay <= 0).all()
    gradients = torch.autograd.grad(log_decay.sum(), (gate, bound))
    assert all(torch.isfinite(x).all() for x in gradients)


def test_published_decays():
    """1 - 2^(-5 - h) by head; ALiBi's slopes, for six heads those of four and two of eight."""
    assert np.allclose(
        np.exp(retention_log_decay("retnet", 3, 0, 12)), [0.96875, 0.984375, 0.9921875]
    )
    eight = np.exp(retention_log_decay("transnormer", 8, 0, 12))
    assert eight[0] == pytest.approx(0.6065, abs=1e-4) and eight[-1] == pytest.approx(
        0.9961, abs=1e-4
    )
    assert max(retention_log_decay("transnormer", 8, 11, 12)) == pytest.approx(0, abs=1e-5)
    six = [-x / (1 + 1e-5) for x in retention_log_decay("transnormer", 6, 0, 12)]
    assert six == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


@pytest.mark.parametrize(
    ("mixer_cls", "options", "message"),
    [
        (AttentionMixer, {"dim": 15}, "dim=15 is not divisible by num_heads=2"),
        *[
            (
                EVAAttentionMixer,
                {"direction": way},
                f"direction='{way}': EVA hears of all tokens; ac",
            )
            for way in ("forward", "backward")
        ],
        (EVAAttentionMixer, {"window": 0}, "window must be a whole number >= 1, got 0"),
        (EVAAttentionMixer, {"landmarks": 2.5}, "landmarks must be a whole number >= 1, got 2.5"),
        (EVAAttentionMixer, {"dim": 12, "rope": True}, "rope needs a key width divisible by 4"),
        (GLAMixer, {"dim": 18}, r"dim=18 is not divisible by 2 \* num_heads=4"),
        (GLAMixer, {"direction": "sideways"}, "direction='sideways' is unknown; accepted: forward"),
        (GLAMixer, {"norm": "batch"}, "norm='batch' is unknown; accepted: layer, rms"),
        (GLAMixer, {"tau": 0}, "tau must be > 0, got 0"),
        (GLAMixer, {"rank": 2.5}, "rank must be a whole number >= 1, got 2.5"),
        (GLAMixer, {"shared_decay": False, "direction": "forward"}, "shared_decay=False needs"),
        (GLAMixer, {"average": True, "direction": "forward"}, "average=True needs direction="),
        (HGRN2Mixer, {"scans": "zigzag"}, "scan order 'zigzag' is unknown"),
        (HGRN2Mixer, {"scans": ("raster", "column", "snake")}, "num_heads=2 cannot be divided"),
        (HGRN2Mixer, {"dim": 12, "rope": True}, "rope needs a key width divisible by 4, got 6"),
        (HGRNMixer, {"rope": True}, "pos_embed='rope2d' turns queries; HGRN has none"),
        (LRUMixer, {"rope": True}, "pos_embed='rope2d' turns queries; LRU has none"),
        (LRUMixer, {"r_min": 1.0}, "0 <= r_min < r_max <= 1 is needed, got 1.0 and 1.0"),
        (LRUMixer, {"max_phase": 0}, "max_phase must be > 0, got 0"),
        (MambaMixer, {"rope": True}, "pos_embed='rope2d' turns queries; Mamba has none"),
        (MambaMixer, {"d_state": 65}, "d_state must be at most 64, got 65"),
        (MambaMixer, {"expand": 1.5}, "expand must be a whole number >= 1, got 1.5"),
        (MambaMixer, {"d_state": 16.0}, r"d_state must be a whole number >= 1, got 16\.0"),
        (MambaMixer, {"expand": "2"}, "expand must be a whole number >= 1, got '2'"),
        (MambaMixer, {"dt_rank": 0}, "dt_rank must be a whole number >= 1, got 0"),
        (
            ReGLAMixer,
            {"gate_bias": float("nan")},
            "gate_bias must be a number from -1e4 to 1e4, got nan",
        ),
        (
            ReGLAMixer,
            {"gate_bias": 1.1e4},
            "gate_bias must be a number from -1e4 to 1e4, got 11000",
        ),
        (ReGLAMixer, {"dim": 12, "rope": True}, "rope needs a key width divisible by 4, got 6"),
        (RetNetMixer, {"dim": 14}, "rotary='scan' needs an even key width, got 7"),
        (RetNetMixer, {"decay": "fast"}, "decay='fast' is unknown; accepted: retnet, transnormer"),
        (RetNetMixer, {"rotary": "2d"}, "rotary='2d' is unknown; accepted: scan, none"),
        (RetNetMixer, {"value_ratio": 5 / 3}, "value_ratio must be 1, 2, 3 or 4, got 1.66"),
        (RetNetMixer, {"layer": 3, "depth": 3}, "layer must be one of 0 ... depth - 1, got 3 of 3"),
        (
            LinearAttentionMixer,
            {"feature_map": "exp"},
            "feature_map='exp' is unknown; accepted: elu",
        ),
        (AttentionMixer, {"conv": "5"}, "conv='5' is unknown"),
        (
            HGRN2Mixer,
            {"dim": 192, "num_heads": 1},
            "num_heads=1 leaves keys of 192 and values of 192 channels a head; 128 and 256",
        ),
        (LinearAttentionMixer, {"conv": "5x5"}, "conv='5x5' is unknown"),
    ],
)
def test_a_wrong_option_is_named(mixer_cls, options, message):
    with pytest.raises(ValueError, match=message):
        mixer_cls(**{"dim": C, "num_heads": H, **options})


@pytest.mark.parametrize("mixer_cls", MIXERS)
def test_under_autocast_a_mixer_stays_near_float32(mixer_cls):
    torch.manual_seed(0)
    mixer, x = mixer_cls(32, 2).eval(), torch.randn(2, 5, 5, 32)
    with torch.no_grad():
        expected = mixer(x)
        with torch.autocast("cpu", torch.bfloat16):
            ours = mixer(x)
    # Some ten roundings of 2^-9 on the way
    assert relative_rms(ours, expected) <= 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_lru_starts_on_its_ring_in_any_type(dtype):
    mixer = LRUMixer(1024, 1, r_min=0.9, r_max=0.9999, dtype=dtype)
    assert all(torch.isfinite(p).all() for p in mixer.parameters())
    radius = torch.exp(-mixer.nu.detach().double().exp())
    assert radius.min() > 0.89 and radius.max() < 1
    if dtype == torch.float32:
        gain = mixer.log_gain.detach().double().exp()
        assert relative_rms(gain, (1 - radius**2).sqrt()) <= 1e-3
        # uniform in area on the ring
        share = (radius**2 - 0.9**2) / (0.9999**2 - 0.9**2)
        assert abs(share.mean() - 0.5) < 0.05 and mixer.theta.exp().max() < 2 * np.pi


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mamba_starts_as_published_in_both_directions(dtype):
    mixer = MambaMixer(192, dtype=dtype)
    for way in mixer.ways:
        step = torch.nn.functional.softplus(way.dt_bias.detach().double())
        assert step.min() > 0.9e-3 and step.max() < 0.11
        # log-uniform: as many steps below the geometric mean of the ends as above it
        assert abs((step < 1e-2).double().mean() - 0.5) < 0.1
        assert torch.equal(way.A_log[0], torch.arange(1, 17).log().to(dtype))
        assert way.dt_weight.abs().max() <= 12**-0.5 and (way.skip == 1).all()
    timm_model = timm.create_model("mamba_nano", depth=1)
    bias = timm_model.blocks[0].mixer.ways[1].dt_bias
    assert bias.max() < -2, "the backbone's start has put biases to 0"


def test_a_block_without_a_channel_mixer():
    model = timm.create_model("mamba_nano", depth=2, mlp_ratio=0)
    assert not any("mlp" in name or "norm2" in name for name in model.state_dict())
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(
        ValueError, match=r"mlp_ratio=0\.001 leaves no hidden width of 128 channels"
    ):
        timm.create_model("mamba_nano", mlp_ratio=0.001)
    with pytest.raises(ValueError, match="mlp_ratio must be a number >= 0, got nan"):
        timm.create_model("mamba_nano", mlp_ratio=float("nan"))
    with pytest.raises(ValueError, match="expand must be a whole number >= 1, got '2'"):
        timm.create_model("mamba_nano", expand="2")
    with pytest.raises(ValueError, match="expand=5, d_state=16 and dt_rank=None leave the channel"):
        timm.create_model("mamba_nano", expand=5)

"""The maps of attention against the operators that they are the maps of, and against equations."""

import numpy as np
import pytest
import timm
import torch

import metala_vision
from metala_vision import layers
from metala_vision.errors import UserError
from metala_vision.layers import inverse, scan_order
from metala_vision.visualize.maps import (
    ACCEPTED,
    CALLERS,
    OPERATORS,
    PRODUCT,
    attention_map,
    feature_map,
    gated_map,
    record,
    record_attention,
    recording,
    relative_weight,
)
from tests._numerics import normal, relative_rms

GRID = (3, 5)
# Both sides compute in float64, the operator in chunks: some 1e-15 of rounding for each of the
# 15 tokens and 8 channels that are summed.
FLOAT64 = 1e-12
# The error rule of the operators in float32, for the operator's side; the map is in float64.
FLOAT32 = 1e-5

MIXERS = {
    "metala": (layers.MetaLAMixer, {}),
    "metala-two-decays": (layers.MetaLAMixer, {"shared_decay": False}),
    "metala-projected": (layers.MetaLAMixer, {"key": "projected", "self_aug": False}),
    "metala-rope": (layers.MetaLAMixer, {"rope": True}),
    "metala-rope-projected-two-decays": (
        layers.MetaLAMixer, {"rope": True, "key": "projected", "shared_decay": False},
    ),
    "gla": (layers.GLAMixer, {}),
    "gla-vig": (layers.GLAMixer, {"shared_decay": False, "average": True}),
    "gla-rope": (layers.GLAMixer, {"rope": True}),
    "hgrn2": (layers.HGRN2Mixer, {}),
    "hgrn2-rope": (layers.HGRN2Mixer, {"rope": True}),
    "regla": (layers.ReGLAMixer, {}),
    "regla-rope": (layers.ReGLAMixer, {"rope": True, "refine": False}),
    "retnet": (layers.RetNetMixer, {}),
    "retnet-rope": (layers.RetNetMixer, {"rope": True, "value_ratio": 2}),
    "transnormer": (layers.RetNetMixer, {"decay": "transnormer", "rotary": "none"}),
    "linear": (layers.LinearAttentionMixer, {}),
    "linear-relu-rope": (layers.LinearAttentionMixer, {"feature_map": "relu", "rope": True}),
    "softmax": (layers.AttentionMixer, {}),
    "softmax-rope": (layers.AttentionMixer, {"rope": True}),
    "eva": (layers.EVAAttentionMixer, {"window": 2, "landmarks": 3}),
    "eva-disjoint-rope": (
        layers.EVAAttentionMixer,
        {"window": 3, "landmarks": 3, "exact_partition": True, "count_tokens": True, "rope": True},
    ),
}  # fmt: skip
ONE_WAY = ("eva", "eva-disjoint-rope")
DIRECTIONS = ("forward", "backward", "bidirectional")


def recorded(name="metala", direction="bidirectional", scans="raster", dtype=torch.float64):
    """The one call of a mixer with large weights, so that its decays differ from each other."""
    kind, options = MIXERS[name]
    if direction != "bidirectional":
        options = {k: v for k, v in options.items() if k not in ("shared_decay", "average")}
    mixer = kind(32, 2, direction=direction, scans=scans, dtype=dtype, **options).eval()
    with torch.no_grad(), recording(mixer) as calls:
        for i, weight in enumerate(mixer.parameters()):
            weight.copy_(normal(*weight.shape, seed=i, dtype=dtype))
        mixer(normal(2, *GRID, 32, seed=99, dtype=dtype))
    (call,) = calls
    return call


def product(call):
    """The map times the values, [B, N, H, V]."""
    _, weights = attention_map(call)
    return torch.einsum("dbhts,bshv->bthv", weights, call.inputs["v"].double())


@pytest.mark.parametrize("scans", ["raster", "hilbert", ("column", "snake")], ids=str)
@pytest.mark.parametrize(
    ("name", "direction"),
    [(n, d) for n in MIXERS for d in DIRECTIONS if n not in ONE_WAY or d == DIRECTIONS[2]],
)
def test_the_map_times_the_values_is_the_output(name, direction, scans):
    call = recorded(name, direction, scans)
    assert call.grid == GRID and call.layer == 0
    assert relative_rms(product(call), call.output) < FLOAT64


@pytest.mark.parametrize("name", MIXERS)
def test_so_it_is_in_float32(name):
    call = recorded(name, scans="diagonal", dtype=torch.float32)
    assert relative_rms(product(call), call.output.double()) < FLOAT32


@pytest.mark.parametrize(
    "name", ["metala", "gla-vig", "hgrn2", "regla", "retnet", "metala-two-decays"]
)
def test_a_wrong_map_is_noticed(name):
    """What the equality above would miss: the order, the scale, the decay, the direction."""
    call = recorded(name, scans="hilbert")
    decay = "gate" if call.inputs.get("gate") is not None else "log_decay"
    wrongs = [
        {"order": None}, {"order": inverse(call.inputs["order"])},
        {"scale": 2 * call.inputs["scale"]}, {decay: 0.9 * call.inputs[decay]},
        {"direction": "forward"},
    ]  # fmt: skip
    if call.inputs[decay].dim() == 5:
        wrongs.append({decay: call.inputs[decay].flip(0)})
    right = call.inputs
    for wrong in wrongs:
        call.inputs = {**right, **wrong}
        assert relative_rms(product(call), call.output) > 1e3 * FLOAT64, wrong


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_wrong_map_of_eva_is_noticed(name):
    call = recorded(name)
    right = call.inputs
    wrongs = [
        {"w": 5 * right["w"].flip(2)}, {"group_key": right["group_key"].flip(2)},
        {"table": right["table"].flip(0)}, {"count_tokens": not right["count_tokens"]},
        {"q": right["q"].flip(1)},
    ]  # fmt: skip
    for wrong in wrongs:
        call.inputs = {**right, **wrong}
        assert relative_rms(product(call), call.output) > 1e3 * FLOAT64, wrong


@pytest.mark.parametrize("scans", ["raster", "spiral"])
def test_the_map_of_metala_by_the_equation(scans):
    """K^-0.5 q_t . (prod_{j=s+1..t} alpha_j * (1 - alpha_s)), product by product."""
    call = recorded("metala-two-decays", scans=scans)
    q, gate = call.inputs["q"].numpy(), call.inputs["gate"].numpy()
    alpha = (1 / (1 + np.exp(-gate))) ** (1 / 16)
    _, N, H, K = q.shape
    visits = scan_order(scans, *GRID).tolist()
    _, weights = attention_map(call)
    for way, path in enumerate((visits, visits[::-1])):
        expected = np.zeros((2, H, N, N))
        for step, t in enumerate(path):
            for earlier, s in enumerate(path[: step + 1]):
                kept = np.prod([alpha[way][:, j] for j in path[earlier + 1 : step + 1]], axis=0)
                taken = q[:, t] * kept * (1 - alpha[way][:, s])
                expected[:, :, t, s] = K**-0.5 * taken.sum(2)
        # 1 - alpha is exact to 1e-16 of 1 here, and alpha^(1/16) may come within 1e-4 of it.
        assert relative_rms(weights[way], torch.from_numpy(expected)) < 1e-11


@pytest.mark.parametrize("name", ["metala", "linear", "softmax"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_nobody_hears_of_a_token_not_visited_yet(name, direction):
    call = recorded(name, direction, "morton")
    names, weights = attention_map(call)
    when = inverse(scan_order("morton", *GRID))
    not_yet = (
        when[None, :] > when[:, None] if direction == "forward" else when[None] < when[:, None]
    )
    assert names == (direction,) and not not_yet.all()
    assert (weights[..., not_yet] == 0).all() and (weights[..., ~not_yet] != 0).all()


def test_rows_of_some_tokens_are_rows_of_the_map():
    for name in ("metala", "linear-relu-rope", "eva", "softmax"):
        call = recorded(name, scans="column")
        names, some = attention_map(call, [7, 0])
        all_names, every = attention_map(call)
        assert names == all_names
        torch.testing.assert_close(some, every[:, :, :, [7, 0]], rtol=1e-12, atol=1e-15)
    assert names == ("all tokens",) and len(recorded_names("metala")) == 2


def recorded_names(name):
    return attention_map(recorded(name), [0])[0]


def test_weights_of_attention_sum_to_one():
    # 1e-6 in linear's denominator
    for name, least in (("softmax", 1e-12), ("linear", 1e-6), ("eva", 1e-12)):
        for direction in DIRECTIONS[2:] if name in ONE_WAY else DIRECTIONS:
            _, weights = attention_map(recorded(name, direction, "snake"))
            assert (weights.sum(-1) - 1).abs().max() < least


def test_decays_of_nothing_and_of_all():
    """log alpha of -inf and -1000 beside 0: differences of sums would be nan, or lose the 0s."""
    q, v, k = (normal(1, 6, 1, 4, seed=i) for i in range(3))
    log_decay = torch.tensor([-1e-3, float("-inf"), 0.0, -1000.0, 0.0, -1e-9], dtype=torch.float64)
    log_decay = log_decay.reshape(1, 6, 1, 1).expand(q.shape)
    call = (q, v, k, None, log_decay, 1.0, 0.5, "forward", None)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    alpha = log_decay[0, :, 0, 0].exp()
    for t in range(6):
        for s in range(t + 1):
            expected[t, s] = 0.5 * alpha[s + 1 : t + 1].prod() * (q[0, t, 0] @ k[0, s, 0])
    torch.testing.assert_close(gated_map(*call)[0, 0, 0], expected, rtol=1e-12, atol=0.0)


FAMILIES = (
    "metala", "attention", "eva_attention", "gla", "hgrn2", "regla", "retnet", "linear_attention"
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_model_is_recorded_once(family):
    model = timm.create_model(f"{family}_nano", embed_dim=32, depth=2, num_heads=2).eval()
    calls, grid, prefix = record_attention(model, torch.randn(1, 3, 24, 40), family)
    assert [call.layer for call in calls] == [0, 1] and (grid, prefix) == (GRID, 0)
    assert all(relative_rms(product(call), call.output.double()) < FLOAT32 for call in calls)


def test_recording_changes_nothing_and_ends():
    before = [getattr(module, name, None) for module in CALLERS for name in OPERATORS]
    model = timm.create_model("metala_nano", embed_dim=32, depth=2, num_heads=1).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(x)
        with recording(model) as calls:
            assert torch.equal(model(x), plain)
        model(x)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="expected images"), recording(model):
        model(x[:, :1])
    after = [getattr(module, name, None) for module in CALLERS for name in OPERATORS]
    assert all(a is b for a, b in zip(before, after, strict=True)) and any(before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_every_operator_has_a_caller():
    """A name that a layer no longer calls would be recorded in vain."""
    for name in OPERATORS:
        assert any(hasattr(module, name) for module in CALLERS), name


def test_softmax_attention_of_timm():
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", embed_dim=32, depth=2, num_heads=2, img_size=(24, 40),
        patch_size=8,
    ).eval()  # fmt: skip
    calls, grid, prefix = record_attention(model, torch.randn(1, 3, 24, 40), "deit")
    assert [call.operator for call in calls] == [PRODUCT] * 2 and (grid, prefix) == (GRID, 2)
    for call in calls:
        names, weights = attention_map(call)
        assert weights.shape == (1, 1, 2, 17, 17) and names == ("all tokens",)
        o = torch.einsum("dbhts,bhsv->bhtv", weights, call.inputs["value"].double())
        assert relative_rms(o, call.output.double()) < FLOAT32


@pytest.mark.parametrize("given", [{"is_causal": True}, {"scale": 0.3}, {}], ids=str)
def test_products_of_every_kind(given):
    q, k, v = (normal(1, 2, 7, 8, seed=i) for i in range(3))

    class Attends(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **given)

    with recording(Attends()) as calls:
        o = Attends()(q, k, v)
    _, weights = attention_map(calls[0])
    assert len(calls) == 1
    assert relative_rms(torch.einsum("dbhts,bhsv->bhtv", weights, v), o) < FLOAT64


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hgrn_nano", "its recurrence weighs each channel by itself"),
        ("lru_nano", "its recurrence weighs each channel by itself"),
        ("mamba_nano", "its recurrence weighs each channel by itself"),
        ("resnet10t", "none of its layers is of that kind"),
        ("beit_base_patch16_224", "attends with a mask or a bias"),
        ("pvt_v2_b0", "attends otherwise than all of 4 tokens to all"),
        ("fastvit_sa12", "2 of its layers attend so, and it has other ones"),
    ],
)
def test_what_has_no_map_is_refused(name, why):
    small = (
        {"depth": 1, "embed_dim": 32} if name.endswith(("nano", "beit_base_patch16_224")) else {}
    )
    if name.startswith("beit"):
        small = {"depth": 1, "embed_dim": 32, "num_heads": 1, "img_size": 64}
    model = timm.create_model(name, **small).eval()
    with pytest.raises(UserError) as error:
        record_attention(model, torch.randn(1, 3, 64, 64), name)
    assert error.value.line == error.value.args[0]
    assert error.value.line.startswith(f"{name} has no attention map per head: ")
    assert why in error.value.line and error.value.line.endswith(ACCEPTED)


def test_windows_of_as_many_tokens_as_the_map_are_refused():
    """davit_tiny's windows at 224 px, 7 x 7, are as large as its last map."""
    model = timm.create_model("davit_tiny").eval()
    with pytest.raises(UserError, match="attends otherwise than all of 49 tokens to all"):
        record_attention(model, torch.randn(1, 3, 224, 224), "davit_tiny")


def test_attention_that_timm_computes_in_parts_is_seen():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    calls, grid, prefix = record_attention(model, torch.randn(1, 3, 64, 64), "vit")
    assert len(calls) == 2 and grid == (4, 4) and prefix == 1
    assert not any(block.attn.fused_attn for block in model.blocks)


def test_every_family_is_tried_here():
    refused = {"hgrn", "lru", "mamba"}
    names = {name.removesuffix("_nano") for name in metala_vision.list_models("*_nano")}
    assert names == {*FAMILIES, *refused}


def test_relative_weight():
    weights = torch.tensor([[[1.0, -3.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = torch.tensor([[[0.5, 1.5], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(relative_weight(weights), expected)


def test_the_feature_map_of_models_that_are_not_ours():
    class Maps(torch.nn.Module):
        output_fmt = "NHWC"

        def forward_features(self, x):
            return x.permute(0, 2, 3, 1)

    class Nothing(torch.nn.Module):
        def forward_features(self, x):
            return x.flatten(1)

    x = torch.randn(1, 3, 4, 5)
    assert torch.equal(feature_map(Maps(), x), x)
    for model in (Nothing(), torch.nn.Identity()):
        with pytest.raises(UserError, match="one gives no map of features; accepted: models with"):
            feature_map(model, x, "one")
    assert record(Maps(), x, "maps") == ([], (4, 5))

"""Half-lives against models whose decays are known in closed form."""

import math

import pytest
import timm
import torch

from metala_vision.errors import UserError
from metala_vision.visualize import memory
from metala_vision.visualize.memory import QUANTILES, memory_lengths, quantiles

SMALL = {"embed_dim": 32, "depth": 2, "img_size": 32}
IMAGES = torch.zeros(2, 3, 32, 32)
EXACT = 1e-5  # log decays and half-lives are in float32: 1e-7, ten times for log1p, exp and sqrt


def zeroed(name, *parts, **options):
    """An untrained model in which the parameters whose name ends so are 0."""
    model = timm.create_model(name, **SMALL, **options).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(parts):
                weight.zero_()
    return model


def test_retnet():
    model = zeroed("retnet_nano", num_heads=4)
    expected = [math.log(2) / -math.log1p(-(2.0 ** (-5 - h))) for h in range(4)]
    found = memory_lengths(model, IMAGES, "retnet")
    assert [(own.layer, own.decay) for own in found] == [
        (0, "both directions"),
        (1, "both directions"),
    ]
    for own in found:
        assert own.heads == pytest.approx(expected, rel=EXACT)
        # Four heads of as many values: the least, the second, the greatest
        assert own.quantiles == pytest.approx([expected[i] for i in (0, 1, 3)], rel=EXACT)
    assert expected[0] == pytest.approx(21.83, abs=0.01)


@pytest.mark.parametrize(
    ("name", "options", "half_lives"),
    [
        # alpha = sigmoid(0)^(1 / tau)
        ("metala_nano", {}, (16, 16)),
        ("metala_nano", {"tau": 4.0}, (4, 4)),
        ("gla_nano", {}, (16, 16)),
        # F = 1/4 + 2/2 1/2 1/2, and g
        ("regla_nano", {}, (1, 1)),
        ("regla_nano", {"refine": False}, (1, 1)),
        # f = gamma + (1 - gamma) / 2, gamma = 0 and 1 / 2
        ("hgrn2_nano", {}, (1, math.log(0.5) / math.log(0.75))),
        ("hgrn_nano", {}, (1, math.log(0.5) / math.log(0.75))),
        # alpha = exp(-e^0)
        ("lru_nano", {}, (math.log(2), math.log(2))),
        # alpha = exp(-softplus(0) e^0) = 1 / 2
        ("mamba_nano", {}, (1, 1)),
        ("mamba_nano", {"shared_parameters": True, "scans": ["raster", "column"],
                        "split_heads": True, "num_heads": 2}, (1, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_constructed_decays(name, options, half_lives):
    parts = ("in_proj.weight", "in_proj.bias", "decay_proj.bias", "nu", "A_log", "dt_bias",
             "dt_weight")  # fmt: skip
    found = memory_lengths(zeroed(name, *parts, **options), IMAGES, name)
    for own in found:
        expected = [half_lives[own.layer]] * len(QUANTILES)
        assert own.quantiles == pytest.approx(expected, rel=EXACT)
        assert own.heads == pytest.approx(expected[:1] * len(own.heads), rel=EXACT)
    both = ["forward", "backward"] if name == "mamba_nano" and not options else ["both directions"]
    assert [own.decay for own in found] == both * 2


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_is_named(direction):
    found = memory_lengths(zeroed("metala_nano", direction=direction), IMAGES, "metala")
    assert {own.decay for own in found} == {direction}


def test_taking_a_state_to_a_greater_maximum_is_not_forgetting():
    """Keys and queries of ReGLA are as at the start, its gates 1 / 2."""
    model = timm.create_model("regla_nano", **SMALL, direction="forward").eval()
    for block in model.blocks:
        block.mixer.in_proj.weight.data[3 * 32 :].zero_()
    for own in memory_lengths(model, torch.randn(2, 3, 32, 32), "regla"):
        assert own.quantiles == pytest.approx([1.0] * 3, rel=EXACT)


def test_a_decay_for_each_direction():
    """The rows of the two decays of W_alpha lie behind those of W_Q."""
    model = zeroed("metala_nano", "in_proj.weight", num_heads=1, shared_decay=False, conv="none")
    mixer = model.blocks[0].mixer
    calls = []
    hook = mixer.in_proj.register_forward_hook(lambda m, x, y: calls.append(y) or one_sided(y))

    def one_sided(y):
        y[..., 32:48] = 40.0  # backward, behind 16 queries and 16 forward gates
        return y

    forward, backward = memory_lengths(model, IMAGES[:1], "metala")[:2]
    hook.remove()
    assert len(calls) == 1 and (forward.decay, backward.decay) == ("forward", "backward")
    assert forward.quantiles == pytest.approx([16.0] * 3, rel=EXACT)
    assert min(backward.quantiles) > 1e15


def test_no_decay_is_refused_and_no_forgetting_is_infinite():
    for name in ("attention_nano", "eva_attention_nano", "linear_attention_nano"):
        with pytest.raises(UserError, match=f"{name} has no decay, .*; accepted: models of MetaLA"):
            memory_lengths(zeroed(name), IMAGES, name)
    model = zeroed("lru_nano")
    with torch.no_grad():
        model.blocks[0].mixer.nu.fill_(-200.0)
    assert memory_lengths(model, IMAGES, "lru")[0].quantiles == [math.inf] * 3


def test_quantiles_are_values_that_a_share_does_not_exceed():
    values = torch.arange(1.0, 31.0)[torch.randperm(30)]
    assert quantiles(values, (0.1, 0.5, 0.9, 1.0)) == [3.0, 15.0, 27.0, 30.0]
    assert quantiles(torch.tensor([2.0, math.inf]), (0.1, 0.5, 0.9)) == [2.0, 2.0, math.inf]


def test_of_very_many_values_every_nth_token_is_taken(monkeypatch):
    model = timm.create_model("metala_nano", **SMALL).eval()
    images = torch.randn(2, 3, 32, 32)
    every = memory_lengths(model, images, "metala")
    monkeypatch.setattr(memory, "MOST", 200)  # of 2 x 16 tokens x 16 channels
    some = memory_lengths(model, images, "metala")
    assert every != some
    # Untrained, all half-lives are near 16: one token or another makes less than a tenth.
    assert some[0].quantiles == pytest.approx(every[0].quantiles, rel=0.1)

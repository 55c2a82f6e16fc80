"""What the unified form refuses, in one line each."""

import pytest
import torch
from torch import nn

from metala_vision.layers import AttentionMixer, GLAMixer, HGRN2Mixer, HGRNMixer, unified
from tests._numerics import normal
from tests.layers.test_unified import C, H, own_mixer


@pytest.mark.parametrize("mixer_cls", [HGRNMixer, HGRN2Mixer, GLAMixer])
def test_a_least_decay_is_asked_for_where_there_is_one(mixer_cls):
    if mixer_cls is GLAMixer:
        with pytest.raises(ValueError, match=r"^GLAMixer has no lower_bound$"):
            unified(mixer_cls(C, H), torch.zeros(C))
    else:
        with pytest.raises(ValueError, match=f"^{mixer_cls.__name__} needs lower_bound, the least"):
            unified(mixer_cls(C, H))


@pytest.mark.parametrize("mixer_cls", [AttentionMixer, nn.Identity])
def test_what_is_no_gated_recurrence_is_refused(mixer_cls):
    why = "is no gated recurrence" if mixer_cls is AttentionMixer else "has no unified form"
    with pytest.raises(ValueError, match=rf"^{mixer_cls.__name__} {why}; accepted: MetaLAMixer, "):
        unified(mixer_cls(C, H))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "sideways"}, "direction='sideways' is unknown; accepted: forward"),
        ({"merge": "max"}, "merge='max' is unknown; accepted: sum, each"),
        ({"impl": "triton"}, "impl='triton' is unknown; accepted: auto, loop, operator"),
        ({"scans": ("raster", "column", "snake")}, "num_heads=2 cannot be divided among 3 scan"),
        ({"conv": "5x5"}, "conv='5x5' is unknown"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        own_mixer(**options)


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("value", lambda x, way: x[..., :3], r"value gave \[1, 2, 3, 3\]; accepted: a number"),
        ("key", lambda x, way: x[0], r"key gave \[2, 3, 16\]; accepted: a number"),
        ("query", lambda x, way: x[..., :6], r"must fit \[B, N, 2 heads, K\] of one K, got .* 3\]"),
        ("query", lambda x, way: x[..., :8] * 1j, "impl='operator' takes real states of K <= 128"),
        ("value", lambda x, way: x[:, :1, :2], r"value gave \[1, 1, 2, 16\]; .* Gh=2, Gw=3"),
        (
            "gate",
            lambda x, way: x[..., :3],
            r"gate gave \[1, 2, 3, 3\]; accepted: a number, \[1, 2",
        ),
        ("decay", lambda x, way: -0.5, r"decay must be in \[0, 1\], got -0.5; impl='loop'"),
        ("decay", lambda x, way: 1.5, r"decay must be in \[0, 1\], got 1.5; impl='loop'"),
    ],
)
def test_functions_that_do_not_fit_are_named(name, function, message):
    mixer = own_mixer(conv="none", impl="operator")
    mixer.replace(**{name: function})
    with pytest.raises(ValueError, match=message):
        mixer(normal(1, 2, 3, C))


@pytest.mark.parametrize(
    "function", [nn.Linear(C, C), lambda x: x, 1.0], ids=["module", "one argument", "number"]
)
def test_what_cannot_be_called_with_map_and_pass_is_named(function):
    with pytest.raises(
        ValueError, match=r"^query must be a function of a map and the pass.*Shared"
    ):
        own_mixer().replace(query=function)

"""FLOPs against counts by hand."""

import pytest
import timm
import torch

import metala_vision  # noqa: F401
from metala_vision.flops import count_flops
from metala_vision.kernels.depthwise_conv import library
from metala_vision.layers import conv

C, H, CLASSES, PATCH, Gh, Gw = 64, 2, 5, 8, 3, 4
N = Gh * Gw
K = C // (2 * H)  # MetaLA's and GLA's keys; their values, and HGRN2's and RetNet's both: 2 K


def product(rows, inner, columns):
    """Of two matrices: a multiplication and an addition for each of the inner dimension."""
    return 2 * rows * inner * columns


def conv3x3(channels):
    return 2 * 9 * N * channels


def glu(hidden):
    return product(N, C, 2 * hidden) + product(N, hidden, C)


def recurrence(key_width, value_width):
    """S = diag(alpha) S + k v^T: 3 K V; o = S^T q: 2 K V; both directions."""
    return 2 * N * H * 5 * key_width * value_width


def mamba():
    """E = 2 C channels of 16 states; each direction has its convolution, step sizes of rank C / 16,
    and 6 operations a state: s A; times h; plus; times k; h q; plus. 3 more a channel: s u, and
    the skip's product and sum. The channel mixer has what is left of 13 C^2."""
    E, M, R = 2 * C, 16, C // 16
    way = conv3x3(E) + product(N, E, R + 2 * M) + product(N, R, E) + N * E * (6 * M + 3)
    return product(N, C, 2 * E) + 2 * way + product(N, E, C)


# The token mixer, and the hidden width of the gated linear unit (13 C^2 parameters a block).
BY_HAND = {
    # q and alpha are half as wide as v and the output gate
    "metala": (
        lambda: product(N, C, 3 * C) + product(N, C, C) + conv3x3(C) + recurrence(K, 2 * K),
        3 * C,
    ),
    # q, k, v; q k^T and its product with v for each head
    "attention": (
        lambda: product(N, C, 3 * C) + product(N, C, C) + conv3x3(C)
        + 2 * H * product(N, C // H, N),
        3 * C,
    ),
    # 3 x 4 tokens padded to a window of 4 x 4, groups of one token: q k^T and its product with v
    # over both; two projections of each group's head. Elementwise, not counted: the groups' own.
    "eva_attention": (
        lambda: product(N, C, 3 * C) + product(N, C, C) + conv3x3(C)
        + 2 * H * product(16, C // H, 16 + N) + 2 * product(N * H, C // H, C // H),
        181,
    ),
    # as MetaLA, and a decay of rank 16
    "gla": (
        lambda: product(N, C, 3 * C) + product(N, C, 16) + product(N, 16, C // 2)
        + product(N, C, C) + conv3x3(C) + recurrence(K, 2 * K),
        3 * C,
    ),
    # c complex, decay, a gate for real and imaginary part; h = a h + b for both, each direction
    "hgrn": (
        lambda: product(N, C, 5 * C) + product(N, 2 * C, C) + conv3x3(C) + 2 * N * 2 * C * 2,
        2 * C,
    ),
    # q, f and v, keys as wide as values
    "hgrn2": (
        lambda: product(N, C, 3 * C) + product(N, C, C) + conv3x3(C) + recurrence(2 * K, 2 * K),
        3 * C,
    ),
    # two gates, keys as wide as values
    "regla": (
        lambda: product(N, C, 5 * C) + product(N, C, C) + conv3x3(C) + recurrence(2 * K, 2 * K),
        149,
    ),
    "retnet": (
        lambda: product(N, C, 4 * C) + product(N, C, C) + conv3x3(C) + recurrence(2 * K, 2 * K),
        171,
    ),
    # u complex; the states of both directions are read
    "lru": (
        lambda: product(N, C, 2 * C) + product(N, 4 * C, C) + conv3x3(C) + 2 * N * 2 * C * 2,
        149,
    ),
    # k^T v, and q times it
    "linear_attention": (
        lambda: product(N, C, 3 * C) + product(N, C, C) + conv3x3(C)
        + 2 * H * product(2 * K, N, 2 * K),
        3 * C,
    ),
    "mamba": (mamba, 75),
}  # fmt: skip


@pytest.mark.parametrize("family", BY_HAND)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_backbone_is_counted_as_by_hand(family, device):
    mixer, hidden = BY_HAND[family]
    shell = product(N, 3 * PATCH * PATCH, C) + product(1, C, CLASSES)
    with torch.device(device):
        model = timm.create_model(
            f"{family}_nano", embed_dim=C, depth=3, num_heads=H, num_classes=CLASSES,
            img_size=(Gh * PATCH, Gw * PATCH),
        )  # fmt: skip
    by_hand = shell + 3 * (mixer() + glu(hidden))
    assert count_flops(model, (3, Gh * PATCH, Gw * PATCH)) == by_hand
    assert model.training


def test_one_direction_costs_half_the_recurrence():
    def count(direction):
        model = timm.create_model("metala_nano", embed_dim=C, depth=1, direction=direction)
        return count_flops(model, (3, 8 * Gh, 8 * Gw))

    assert count("bidirectional") - count("forward") == recurrence(K, 2 * K) // 2


def test_deit_is_counted_as_its_paper_has_it():
    """1.3 G multiply-adds for DeiT-Ti at 224 px (timm's results tables: 1.3 GMACs)."""
    model = timm.create_model("deit_tiny_patch16_224")
    tokens, width = 197, 192
    block = 12 * width**2 * 2 * tokens + 2 * 2 * tokens**2 * width
    shell = 2 * 196 * 768 * width + 2 * width * 1000
    assert count_flops(model, (3, 224, 224)) == 12 * block + shell
    assert (12 * block + shell) / 2e9 == pytest.approx(1.3, abs=0.05)


@pytest.mark.parametrize("name", ["cait_xxs24_224", "pit_ti_224"])
def test_models_that_use_gradients_to_be_counted(name):
    """FlopCounterMode fails for them where parameters are trained; they are so again behind it."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count_flops(model, (3, 224, 224)) > 1e9
    assert all(p.requires_grad for p in model.parameters())


def test_operators_outside_are_not_nodes():
    """The switch is off again, also behind an error."""
    from metala_vision.kernels import _fused

    model = timm.create_model("metala_nano", embed_dim=C, depth=1)
    with pytest.raises(ValueError):
        count_flops(model, (4, 64, 64))
    assert not _fused._whole and model.training


def test_the_convolution_is_counted_where_a_kernel_takes_it(monkeypatch):
    model = timm.create_model("metala_nano", depth=1)
    expected = count_flops(model, (3, 64, 64))
    monkeypatch.setattr(conv, "on_gpu", lambda x: True)
    monkeypatch.setattr(library, "wanted", lambda device: True)
    assert count_flops(model, (3, 64, 64)) == expected

"""Receptive fields known in closed form, or by what a model cannot see."""

import pytest
import timm
import torch
import torch.nn.functional as F

from metala_vision.errors import UserError
from metala_vision.visualize.receptive_field import (
    growing_squares,
    receptive_field,
    side_that_holds,
)
from tests._numerics import normal, relative_rms


class Patches(torch.nn.Module):
    """A patch of 4 x 4 pixels makes a token: its sum times its own first pixel's sign."""

    def forward_features(self, x):
        first = x[:, :1, ::4, ::4].sign()
        return F.conv2d(x, torch.ones(2, 3, 4, 4, dtype=x.dtype), stride=4) * first


def test_a_field_in_closed_form():
    """Two channels, three colours, derivatives of 1 or -1: 6 in the patch, for any sign."""
    images = normal(5, 3, 8, 12)
    field, grid, token = receptive_field(Patches(), images, (1, 0), "patches")
    expected = torch.zeros(8, 12, dtype=torch.float64)
    expected[4:8, 0:4] = 6.0
    assert (grid, token) == ((2, 3), (1, 0)) and images[:, 0, 4, 0].sign().unique().numel() == 2
    assert torch.equal(field, expected)
    assert receptive_field(Patches(), images, None, "patches")[2] == (1, 1)


def test_a_causal_model_sees_nothing_of_later_patches():
    options = {"embed_dim": 32, "depth": 2, "num_heads": 1, "img_size": 32, "conv": "none"}
    model = timm.create_model("metala_nano", direction="forward", **options).eval()
    field, grid, token = receptive_field(model, torch.randn(2, 3, 32, 32), (1, 2), "causal")
    patches = F.avg_pool2d(field[None, None], 8).flatten()
    assert grid == (4, 4) and token == (1, 2)
    assert (patches[:7] > 0).all() and (patches[7:] == 0).all()


def test_the_gradient_is_none_of_rounding():
    """Behind the final norm the sum over channels is constant, and its gradient nothing else."""
    options = {"embed_dim": 32, "depth": 2, "num_heads": 1, "img_size": 32}
    model = timm.create_model("metala_nano", **options).eval()
    images = torch.randn(1, 3, 32, 32)
    field, *_ = receptive_field(model, images, None, "metala")
    exact, *_ = receptive_field(model.double(), images.double(), None, "metala")
    assert relative_rms(field, exact) < 1e-5  # of float32, through two layers
    x = images.double().requires_grad_()
    (behind,) = torch.autograd.grad(model.forward_features(x)[0, 2, 2].sum(), x)
    assert behind.abs().max() < 1e-10 * exact.max()


@pytest.mark.parametrize("name", ["resnet10t", "deit_tiny_patch16_224", "mamba_nano"])
def test_models_of_every_kind(name):
    small = {} if name == "resnet10t" else {"embed_dim": 48, "depth": 1, "img_size": 64}
    small |= {"num_heads": 1} if name != "resnet10t" else {}
    model = timm.create_model(name, **small).eval()
    field, grid, _ = receptive_field(model, torch.randn(2, 3, 64, 64), None, name)
    assert field.shape == (64, 64) and field.dtype == torch.float64 and (field >= 0).all()
    assert grid == {"resnet10t": (2, 2), "mamba_nano": (8, 8)}.get(name, (4, 4))


def test_growing_squares():
    """3 x 2 patches of 4 pixels; the middle of token (0, 1) is at row 2, column 6."""
    field = torch.zeros(12, 8)
    field[1, 5] = field[2, 6] = 1.0  # next to the middle: within 2 px
    field[0, 4] = 2.0  # the patch's corner: within 4 px
    field[11, 0] = 4.0  # 10 rows away, 20 px
    sides, shares, areas = growing_squares(field, (0, 1), (3, 2))
    assert sides == list(range(2, 21, 2))
    held = dict(zip(sides, shares, strict=True))
    assert held[2] == 0.25 and held[4] == 0.5 == held[18] and held[20] == 1.0
    area = dict(zip(sides, areas, strict=True))
    # Of 96 pixels; a square of 8 reaches above and to the right of the image: 6 rows, 6 columns
    assert area[2] == 4 / 96 and area[4] == 16 / 96 and area[8] == 36 / 96 and area[20] == 1.0
    found = [side_that_holds(share, sides, shares) for share in (0.2, 0.25, 0.3, 0.5, 0.95)]
    assert found == [2, 2, 4, 4, 20]


def test_an_odd_patch_has_a_pixel_in_the_middle():
    sides, shares, _ = growing_squares(torch.ones(9, 9), (1, 1), (3, 3))
    assert sides == [1, 3, 5, 7, 9]
    assert shares == pytest.approx([n * n / 81 for n in sides], rel=1e-12)


def test_what_has_no_field_is_refused():
    class Constant(torch.nn.Module):
        def forward_features(self, x):
            return 0 * x

    image = torch.randn(1, 3, 4, 6)
    with pytest.raises(UserError, match=r"constant has no gradient at token \(2, 3\): it is 0 or"):
        receptive_field(Constant(), image, None, "constant")
    for token in ((4, 0), (0, 6), (-1, 0)):
        with pytest.raises(UserError) as error:
            receptive_field(Constant(), image, token, "constant")
        assert error.value.line == (
            f"--token {token[0]} {token[1]} is not on the grid of 4 x 6 tokens; accepted: row 0 to "
            "3, column 0 to 5"
        )

"""Scan orders: no token lost on any grid, neighbours where promised, raster order outside."""

import pytest
import timm
import torch

from metala_vision.layers import MetaLAMixer, inverse, scan_order
from metala_vision.layers.scan import ANY_SIZE, check_scans, token_order
from tests._numerics import SAME, normal, relative_rms

NAMES = (
    "raster", "column", "snake", "diagonal", "hilbert", "morton", "spiral", "window(1)",
    "window(3)", "window(7)", "window(64)",
)  # fmt: skip
SIDES = range(1, 41)
LONG = [(1, 97), (97, 1), (2, 61), (61, 3), (53, 47), (128, 64)]


def steps(order, Gw):
    """Rows plus columns that each step crosses."""
    r, c = order // Gw, order % Gw
    return (r[1:] - r[:-1]).abs() + (c[1:] - c[:-1]).abs()


@pytest.mark.parametrize("name", NAMES)
def test_every_grid_is_covered_once_and_the_inverse_is_right(name):
    grids = [(h, w) for h in SIDES for w in SIDES] + LONG
    for Gh, Gw in grids:
        order = scan_order(name, Gh, Gw)
        tokens = torch.arange(Gh * Gw)
        assert torch.equal(order.sort().values, tokens), (Gh, Gw)
        assert torch.equal(inverse(order)[order], tokens), (Gh, Gw)
        crossed = steps(order, Gw)
        if name in ("snake", "spiral") or (name == "hilbert" and Gh % 2 == Gw % 2 == 0):
            assert (crossed == 1).all(), (Gh, Gw)
        if name == "hilbert" and Gh * Gw > 1:  # elsewhere at most one step is diagonal
            assert crossed.sum() <= Gh * Gw, (Gh, Gw)
            assert (order // Gw).diff().abs().max() <= 1, (Gh, Gw)
            assert (order % Gw).diff().abs().max() <= 1, (Gh, Gw)


def visit(name, Gh, Gw):
    return scan_order(name, Gh, Gw).tolist()


def test_orders_by_hand():
    assert visit("raster", 2, 3) == [0, 1, 2, 3, 4, 5]
    assert visit("column", 2, 3) == [0, 3, 1, 4, 2, 5]
    assert visit("snake", 2, 3) == [0, 1, 2, 5, 4, 3]
    assert visit("diagonal", 2, 3) == [0, 1, 3, 2, 4, 5]
    assert visit("spiral", 3, 3) == [0, 1, 2, 5, 8, 7, 6, 3, 4]
    assert visit("morton", 2, 4) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert visit("window(2)", 2, 4) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert visit("window(2)", 3, 3) == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert visit("hilbert", 2, 2) == [0, 2, 3, 1]


def test_hilbert_keeps_neighbourhoods():
    """In a Hilbert curve of 16x16, tokens 16 steps apart lie within 4x4 blocks' reach."""
    order = scan_order("hilbert", 16, 16)
    r, c = order // 16, order % 16
    apart = torch.maximum((r[16:] - r[:-16]).abs(), (c[16:] - c[:-16]).abs())
    assert apart.max() <= 8 < 15  # raster: 16 steps are always a whole row apart in r, snake 15


@pytest.mark.parametrize("name", ["hilbert", "spiral", "column", "window(2)"])
def test_features_come_back_in_raster_order(name):
    """The mixer's own input reaches its own output most: fails without the inverse."""
    mixer = MetaLAMixer(16, 2, conv="none", direction="forward", scans=name, dtype=torch.float64)
    x = normal(1, 4, 6, 16, seed=1)
    order = scan_order(name, 4, 6)
    by_hand = MetaLAMixer(16, 2, conv="none", direction="forward", dtype=torch.float64)
    by_hand.load_state_dict(mixer.state_dict())
    tokens = x.flatten(1, 2)[:, order].reshape(1, 24, 1, 16)  # a strip of tokens as visited
    expected = by_hand(tokens).reshape(1, 24, 16)[:, inverse(order)].reshape(x.shape)
    assert relative_rms(mixer(x).detach(), expected.detach()) <= 1e-13
    without = by_hand(tokens).reshape(x.shape)
    assert relative_rms(without.detach(), expected.detach()) > 1e-2


def test_split_heads_give_each_head_its_order():
    names = ("raster", "column", "hilbert", "snake")
    orders = token_order(torch.zeros(1, 4, 6, 8), list(names), 8)
    assert orders.shape == (8, 24)
    for h in range(8):
        assert torch.equal(orders[h], scan_order(names[h // 2], 4, 6))
    assert token_order(torch.zeros(1, 4, 6, 8), ["raster"], 8) is None


def small(**kwargs):
    arguments = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5, **kwargs}
    return timm.create_model("metala_nano", **arguments)


def test_layers_take_the_orders_in_turn_or_split_their_heads():
    in_turn = small(scans=("raster", "column"))
    assert [b.mixer.scans for b in in_turn.blocks] == [["raster"], ["column"], ["raster"]]
    split = small(scans=("raster", "column"), split_heads=True)
    assert all(b.mixer.scans == ["raster", "column"] for b in split.blocks)
    x = torch.randn(1, 3, 64, 48)
    assert in_turn.forward_features(x).shape == split.forward_features(x).shape == (1, 8, 6, 32)


@pytest.mark.export
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", ["column", "hilbert", "spiral", ("raster", "morton")], ids=str)
def test_scans_script_and_compile_to_the_same_numbers(name):
    model = small(scans=name, split_heads=isinstance(name, tuple)).eval()
    x = torch.randn(1, 3, 64, 48)
    expected = model(x)
    # eager Python takes the anchor, a script the tree
    assert relative_rms(torch.jit.script(model)(x), expected) <= SAME
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    ("scans", "message"),
    [
        ("zigzag", "scan order 'zigzag' is unknown; accepted: raster, column, snake"),
        ("window(0)", r"scan order 'window\(0\)' is unknown; .*window\(SIZE\)"),
        (("raster", "Hilbert"), "scan order 'Hilbert' is unknown"),
        ((), r"scans=\(\) names no order"),
        ((3,), "scan order 3 is unknown"),
    ],
)
def test_an_unknown_order_is_named(scans, message):
    with pytest.raises(ValueError, match=message):
        check_scans(scans)
    with pytest.raises(ValueError, match=message):
        small(scans=scans)


def test_heads_that_cannot_be_divided_are_named():
    with pytest.raises(ValueError, match="num_heads=2 cannot be divided among 3 scan orders"):
        small(scans=("raster", "column", "snake"), split_heads=True)


def test_an_empty_grid_is_named():
    with pytest.raises(ValueError, match="at least one row and one column, got 0x3"):
        scan_order("snake", 0, 3)


class OrderOf(torch.nn.Module):
    """The tokens of a map in a scan order; what a mixer does with it, for the export alone."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        order = token_order(x, [self.name], 1)
        tokens = x.flatten(1, 2)
        return tokens if order is None else tokens[:, order]


def export_with_dynamic_grid(name):
    dims = {1: torch.export.Dim("Gh", max=64), 2: torch.export.Dim("Gw", max=64)}
    return torch.export.export(
        OrderOf(name), (torch.randn(1, 4, 6, 2),), dynamic_shapes={"x": dims}, strict=False
    ).module()


@pytest.mark.parametrize("name", ANY_SIZE)
def test_a_dynamic_grid_survives_export(name):
    exported = export_with_dynamic_grid(name)
    x = torch.randn(1, 7, 5, 2)
    expected = x.flatten(1, 2)[:, scan_order(name, 7, 5)]
    assert torch.equal(exported(x), expected)


@pytest.mark.parametrize("name", ["hilbert", "spiral"])
def test_other_orders_say_that_they_need_a_fixed_size(name):
    with pytest.raises(ValueError, match=f"scan order '{name}' needs an image size that is fixed"):
        export_with_dynamic_grid(name)


def test_an_order_first_seen_in_inference_mode_serves_training():
    x = torch.randn(1, 3, 24, 136)
    model = small(scans="hilbert")
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()

"""examples/segmentation.py as a user runs it: scenes, folders of masks, figures, mistakes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
# A backbone and a training of a second.
QUICK = (
    "--model-kwargs", "embed_dim=32", "depth=4", "num_heads=1", "--no-pretrained", "--img-size",
    "32", "--steps", "3", "--batch-size", "4", "--scenes", "8", "--held-out", "6",
)  # fmt: skip


@pytest.fixture(scope="module")
def example():
    """The script as a module; its neighbours are found as when it is run."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("segmentation")
    finally:
        sys.path.remove(str(EXAMPLES))
        for name in ("segmentation", "_scenes", "_masks"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def scenes(example):
    return example.Scenes(48, 12, 12)


def run(example, *flags):
    assert example.main([*QUICK, *map(str, flags)]) == 0


# Scenes


def test_where_the_mask_is_background_the_pixel_is_the_photographs(scenes):
    for held_out in (False, True):
        for seed in range(8):
            image, mask = scenes.scene(held_out, torch.Generator().manual_seed(seed))
            behind = scenes.background(held_out, torch.Generator().manual_seed(seed))
            digit = mask > 0
            assert digit.any() and not digit.all()
            assert torch.equal(image[:, ~digit], behind[:, ~digit])
            # A digit is nowhere transparent: next to no pixel keeps its colour by accident.
            kept = (image == behind).all(0)[digit].double().mean()
            assert kept < 0.02
            assert image.min() >= 0 and image.max() <= 1


def test_a_mask_has_the_shape_and_the_label_of_the_digit(example):
    """Of a single digit in the whole scene, upright: its ink above the limit, scaled by hand."""
    scenes = example.Scenes(48, 1, 1)
    for label in range(10):
        index = int((scenes.labels == label).nonzero()[0])
        scenes.instances[False] = np.array([index])
        _, mask = scenes.scene(False, torch.Generator().manual_seed(label))
        assert set(mask.unique().tolist()) == {0, label + 1}


def test_ink_lies_where_the_digit_was_placed(scenes, monkeypatch):
    module = sys.modules["_scenes"]
    monkeypatch.setattr(module, "SIDE", (1.0, 1.0))
    monkeypatch.setattr(module, "TURN", 0.0)
    ink = scenes._placed(scenes.digits[:1], torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(
        scenes.digits[None, :1], (48, 48), mode="bicubic", align_corners=False
    )[0]
    # Beyond the border there is no ink, where interpolate repeats the border's.
    inner = (..., slice(12, 36), slice(12, 36))
    torch.testing.assert_close(ink[inner], expected[inner], atol=1e-5, rtol=0)


def test_nothing_is_on_both_sides(example, scenes):
    """Whatever happens to one side's digits and photographs, the other's scenes are the same."""
    one, other = (set(part.tolist()) for part in scenes.instances.values())
    assert not one & other and len(one | other) == len(scenes.labels) == 1797
    for part in scenes.instances.values():
        assert set(scenes.labels[torch.from_numpy(part)].tolist()) == set(range(10))
    before = {side: scenes._many(side, 6, 0)[0] for side in (True, False)}
    for damaged in (True, False):
        own = example.Scenes(48, 12, 12)
        own.digits[torch.from_numpy(own.instances[damaged])] = 1.0
        for region in own.regions[damaged]:
            region.fill_(0.5)  # a part of the photograph itself
        assert torch.equal(own._many(not damaged, 6, 0)[0], before[not damaged])
        assert not torch.equal(own._many(damaged, 6, 0)[0], before[damaged])


def test_scenes_are_of_their_seed(example, scenes):
    again = example.Scenes(48, 12, 12)
    for one, two in zip(scenes.fixed(3), again.fixed(3), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(scenes.fixed(3)[0], scenes.fixed(4)[0])
    held_out = [torch.cat(part) for part in zip(*scenes.held_out(5), strict=True)]
    assert torch.equal(held_out[0], next(again.held_out(12))[0]) and len(held_out[1]) == 12
    images, masks = next(scenes.training(3, 12))  # all of them, in another order
    assert torch.equal(images.sum((1, 2, 3)).sort()[0], again.fixed(3)[0].sum((1, 2, 3)).sort()[0])
    assert masks.shape == (12, 48, 48)


# Figures


def test_mean_iou_by_hand(example):
    truth = torch.tensor([[[0, 0, 1], [1, 2, 255]]])
    answer = torch.tensor([[[0, 1, 1], [1, 0, 2]]])
    matrix = example.confusion(truth, answer, 4)
    expected = [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert matrix.tolist() == expected
    miou, accuracy, ious = example.scores(matrix)
    # 0: 1 right of 3; 1: 2 of 3; 2: none of 1; 3 is nowhere.
    assert ious == pytest.approx([100 / 3, 200 / 3, 0.0, None])
    assert miou == pytest.approx(100 / 3) and accuracy == pytest.approx(60)


def test_the_table_has_mean_and_deviation(example):
    runs = [{"miou": m, "pixel_accuracy": 90.0, "cpu_seconds": 2.0} for m in (10.0, 12.0, 14.0)]
    assert example.table({"a": runs}).splitlines()[2] == "| a | 12.00 ± 2.00 | 90.00 ± 0.00 | 2 |"


# Runs


@pytest.mark.launch
def test_it_runs_as_written(tmp_path):
    picture, numbers = tmp_path / "p.png", tmp_path / "n.json"
    flags = [x for x in QUICK[4:] if x != "--no-pretrained"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "segmentation.py"), *flags, "--compare", "--seeds", "1",
         "--picture", str(picture), "--json", str(numbers)],
        cwd=EXAMPLES.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(numbers.read_text())
    assert list(found["rows"]) == ["pretrained, frozen", "random, frozen"]
    for name, runs in found["rows"].items():
        assert [own["seed"] for own in runs] == [1]
        assert f"| {name} | " in done.stdout and len(runs[0]["iou"]) == 11
    with Image.open(picture) as image:
        assert image.width > image.height / 2 > 100


@pytest.mark.launch
def test_it_repeats_bit_by_bit(example, tmp_path):
    rows = []
    for name, steps in (("a", 1), ("b", 3), ("c", 3)):
        run(example, "--unfreeze", "--steps", steps, "--json", tmp_path / name)
        rows.append(json.loads((tmp_path / name).read_text())["rows"]["random, trained"][0])
        rows[-1].pop("cpu_seconds")
    assert rows[1] == rows[2] != rows[0]


@pytest.mark.parametrize("unfreeze", [False, True])
def test_a_frozen_backbone_stays_bit_by_bit(example, scenes, unfreeze):
    given = example.parse([*QUICK, "--img-size", "48", *["--unfreeze"] * unfreeze])
    model = example.build(given, 11, False, 0)
    assert all(p.requires_grad == unfreeze for p in model.backbone.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    example.train(model, scenes, given, 0)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("fuse.") for k in changed)
    assert any(k.startswith("project.") for k in changed)
    assert any(k.startswith("backbone.") for k in changed) == unfreeze
    assert model.train().backbone.training == unfreeze


def test_maps_computed_once_are_those_of_each_step(example, scenes):
    given = example.parse([*QUICK, "--img-size", "48"])
    model = example.build(given, 11, False, 0).train()
    once = example.batches(model, scenes, given, 5)
    for (maps, masks), (images, expected), _ in zip(
        once, scenes.training(5, given.batch_size), range(3), strict=False
    ):
        assert torch.equal(masks, expected)
        for one, other in zip(maps, model.maps(images), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# Folders of masks


@pytest.fixture
def folders(tmp_path):
    """Ten photographs' parts of two sizes; classes 1 and 2, as Pets' trimaps, and 255."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(10):
        height, width = 40 + 8 * (i % 2), 36
        mask = np.ones((height, width), np.uint8)
        mask[:, : 6 + 2 * i] = 2
        mask[:3] = 255
        image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        image[mask == 2] += 150
        Image.fromarray(image).save(tmp_path / "images" / f"pet{i}.jpg", quality=95)
        Image.fromarray(mask).save(tmp_path / "masks" / f"pet{i}.png")
    Image.fromarray(image).save(tmp_path / "images" / "unlabelled.jpg")
    (tmp_path / "masks" / "._pet1.png").write_bytes(b"a Mac's")
    return tmp_path


def both(folders):
    return ["--images", folders / "images", "--masks", folders / "masks"]


def test_your_masks_are_learned(example, folders, tmp_path):
    flags = [*both(folders), "--first-class", 1, "--steps", 25, "--unfreeze"]
    out = tmp_path / "numbers.json"
    run(example, *flags, "--json", out, "--picture", tmp_path / "own.png")
    found = json.loads(out.read_text())
    assert found["classes"] == ["class 0", "class 1"]
    assert found["rows"]["random, trained"][0]["miou"] > 70
    run(example, *both(folders), "--first-class", 1)  # frozen, maps of each step


def test_crops_and_flips_are_of_both_and_of_the_seed(example, folders):
    def data():
        return example.MaskFolders(folders / "images", folders / "masks", 32, 1, 0.2)

    images, masks = next(data().training(7, 8))
    again = next(data().training(7, 8))
    other = next(data().training(8, 8))
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1])
    assert not torch.equal(masks, other[1])
    assert type(images) is torch.Tensor and masks.dtype == torch.long
    assert set(masks.unique().tolist()) <= {0, 1, 255}
    bright = images.mean(1) > 0.4
    known = masks != 255
    assert ((masks == 1) == bright)[known].double().mean() > 0.93  # JPEG and scaling at the edges
    train, held = data().parts[False], data().parts[True]
    assert not set(train) & set(held) and len(held) == 2 and len(train) == 8


def test_a_batch_of_which_nothing_is_known_teaches_nothing(example, folders):
    for path in (folders / "masks").glob("pet*.png"):
        mask = np.array(Image.open(path))
        mask[:-1] = 255  # but a row, which most crops lack
        Image.fromarray(mask).save(path)
    data = example.MaskFolders(folders / "images", folders / "masks", 32, 1, 0.2)
    given = example.parse([*QUICK, "--batch-size", "2", "--steps", "12"])
    assert any((next(data.training(seed, 2))[1] == 255).all() for seed in range(9))
    model = example.build(given, 2, False, 0)
    example.train(model, data, given, 0)
    assert all(x.isfinite().all() for x in model.state_dict().values())


def spoil(name, folders):
    """One mistake in the user's files."""
    mask, image = folders / "masks" / "pet1.png", folders / "images" / "pet1.jpg"
    if name == "alone":
        image.unlink()
    elif name == "sizes":
        Image.new("L", (5, 6), 1).save(mask)
    elif name == "colours":
        Image.new("RGB", (36, 48)).save(mask)
    elif name == "low":
        Image.new("L", (36, 48), 0).save(mask)
    elif name == "broken":
        mask.write_bytes(mask.read_bytes()[:60])
    elif name == "twice":
        Image.new("RGB", (36, 48)).save(image.with_suffix(".png"))
    elif name == "one class":
        for path in (folders / "masks").glob("pet*.png"):
            with Image.open(path) as opened:
                size = opened.size
            Image.new("L", size, 1).save(path)
    elif name == "empty":
        for path in (folders / "masks").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("alone", "pet1.png has no image pet1.* in "),
        ("sizes", "pet1.png is 5x6, its image 36x48"),
        ("colours", "pet1.png holds colours or wide numbers (RGB); class numbers are wanted"),
        ("low", "pet1.png has class 0, below --first-class 1"),
        ("broken", "pet1.png and its image: "),
        ("twice", "have the same name"),
        ("one class", "hold one class; two or more are needed"),
        ("empty", "holds no files that end in .png"),
    ],
)
def test_a_mistake_in_the_files_is_one_line(example, folders, name, told, capsys):
    spoil(name, folders)
    assert example.main([*QUICK, *map(str, both(folders)), "--first-class", "1"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "metala_nan"], "is no timm model; did you mean metala_nano?"),
        (["--img-size", "36"], "metala_nano for images of 36x36: image height and width must be"),
        (["--model-kwargs", "colour=3"], "metala_nano for images of 32x32: "),
        (["--model-kwargs", "depth"], "--model-kwargs takes KEY=VALUE, as in patch_size=4"),
        (["--model", "metala_tiny", "--pretrained"], "no weights for metala_tiny"),
        (["--steps", "0"], "--steps needs 1 or more, got 0"),
        (["--batch-size", "1"], "--batch-size needs 2 or more, got 1"),
        (["--lr", "nan"], "--lr needs a number above 0, got nan"),
        (["--seeds", "1", "1"], "--seeds needs different numbers of 0 or more, got [1, 1]"),
        (["--val-fraction", "1"], "--val-fraction needs more than 0 and less than 1: 1.0"),
        (["--compare"], "leave out --no-pretrained"),
        (["--images", "x"], "--masks is missing"),
        (["--images", "x", "--masks", "y"], "folder x does not exist"),
        (["--picture", "x.jpg"], "--picture must end in one of .png .pdf .svg, got x.jpg"),
        (["--json", "nowhere/x.json"], "x.json is in nowhere, which does not exist"),
        (["--device", "abacus"], "--device abacus: "),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(example, flags, told, capsys):
    assert example.main([*QUICK, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("segmentation.py: error: ") and told in error
    assert error.count("\n") == 1

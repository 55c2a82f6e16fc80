"""Images kept on the device: Pillow's bytes, the written-out rules, the other loader's batches."""

import json
import math
import random
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torchvision.transforms import functional as F

from metala_vision.build import create_model
from metala_vision.cli import main
from metala_vision.config import DataConfig, ModelConfig
from metala_vision.data import create_loaders
from metala_vision.errors import UserError
from metala_vision.on_device import colour, draws, kept
from metala_vision.on_device.resize import resize, resize_weights
from metala_vision.splits import find_split
from tests.conftest import SMALL_MODEL

AFTER_12 = int(PIL.__version__.split(".")[0]) > 12
MODEL = ModelConfig(
    model="metala_nano", img_size=16, model_kwargs={"embed_dim": 32, "num_heads": 1, "depth": 1}
)


def loaders(data, seed=0, rank=0, world=1):
    split = find_split(data)
    model = create_model(MODEL, split.num_classes)
    return create_loaders(data, MODEL, model, split, seed, rank, world)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def images(x):
    """[B, C, h, w] bytes as Pillow's images."""
    return [Image.fromarray(one[0] if len(one) == 1 else one.transpose(1, 2, 0)) for one in x]


def stacked(of):
    return torch.stack([F.pil_to_tensor(image) for image in of])


# Resampling and colours are Pillow's


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 48),
    channels=st.sampled_from([1, 3]), seed=st.integers(0, 2**16), data=st.data(),
)  # fmt: skip
def test_crop_resize_and_mirror_are_pillows(height, width, size, channels, seed, data):
    x, B = pixels(3, channels, height, width, seed=seed), 3
    boxes, cubic, flip = [], [], []
    for _ in range(B):
        h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top = data.draw(st.integers(0, height - h))
        boxes.append((top, data.draw(st.integers(0, width - w)), h, w))
        cubic.append(data.draw(st.booleans()))
        flip.append(data.draw(st.booleans()))
    top, left, h, w = torch.tensor(boxes).T
    ours = resize(
        torch.from_numpy(x),
        resize_weights(top, h, height, size, torch.tensor(cubic)),
        resize_weights(left, w, width, size, torch.tensor(cubic), torch.tensor(flip)),
    )
    for i, image in enumerate(images(x)):
        if AFTER_12 and (boxes[i][2] < size) != (boxes[i][3] < size):
            continue  # another order of the passes
        mode = str_to_interp_mode("bicubic" if cubic[i] else "bilinear")
        theirs = F.resized_crop(image, *boxes[i], [size, size], mode)
        theirs = F.pil_to_tensor(F.hflip(theirs) if flip[i] else theirs)
        assert torch.equal(ours[i], theirs.float())


def test_a_filter_that_is_not_pillows_is_noticed():
    """torch's own bicubic has a sharper filter, -0.75 for -0.5."""
    x = pixels(1, 3, 32, 32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(x).float(), 48, mode="bicubic")
    of_pillow = stacked([image.resize((48, 48), Image.Resampling.BICUBIC) for image in images(x)])
    assert ((theirs - of_pillow).abs() > 1).float().mean() > 0.3


@settings(max_examples=30, deadline=None)
@given(channels=st.sampled_from([1, 3]), strength=st.floats(0.05, 1.5), seed=st.integers(0, 2**16))
def test_jitter_is_pillows(channels, strength, seed):
    x = pixels(6, channels, 9, 9, seed=seed)
    numbers = draws.uniform(seed, 0, range(6))
    factors, order = draws.jitters(numbers, strength)
    assert (factors >= max(0, 1 - strength)).all() and (factors <= 1 + strength).all()
    ours = colour.jitter(
        torch.from_numpy(x).float(), torch.from_numpy(factors).float(), torch.from_numpy(order)
    )
    steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for i, image in enumerate(images(x)):
        for step in order[i]:
            image = steps[step](image, float(np.float32(factors[i, step])))
        assert torch.equal(ours[i], F.pil_to_tensor(image).float())


# The numbers


@settings(max_examples=30, deadline=None)
@given(
    places=st.lists(st.integers(0, 5000), min_size=1, max_size=20, unique=True),
    cut=st.integers(0, 20), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 500),
)  # fmt: skip
def test_an_images_numbers_are_its_places_alone(places, cut, seed, epoch):
    whole = draws.uniform(seed, epoch, places)
    parts = [draws.uniform(seed, epoch, own) for own in (places[:cut], places[cut:]) if own]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, draws.uniform(seed, epoch + 1, places))


def crop_by_hand(u, height, width, scale, ratio):
    """timm's rule for one image, of the numbers u."""
    for attempt in range(draws.ATTEMPTS):
        area = (scale[0] + (scale[1] - scale[0]) * u[2 * attempt]) * height * width
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * u[2 * attempt + 1])
        w, h = max(round(math.sqrt(area * aspect)), 1), max(round(math.sqrt(area / aspect)), 1)
        if w <= width and h <= height:
            return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)), seed=st.integers(0, 2**16),
    low=st.floats(0.01, 1), ratio=st.sampled_from([(0.75, 4 / 3), (1.0, 1.0), (0.5, 3.0)]),
)  # fmt: skip
def test_crops_are_the_rule_written_out(size, seed, low, ratio):
    numbers = draws.uniform(seed, 0, range(40))
    found = draws.crops(numbers, size, (low, 1.0), ratio)
    for i, u in enumerate(numbers[:, draws.CROP : draws.FLIP]):
        expected = crop_by_hand(u, *size, (low, 1.0), ratio)
        assert (found.top[i], found.left[i], found.height[i], found.width[i]) == expected


def test_crops_have_timms_distribution():
    """Means of area, ratio and place of 20,000 crops each, within six standard errors."""
    scale, ratio, size = (0.25, 1.0), (0.75, 4 / 3), (64, 48)
    found = draws.crops(draws.uniform(0, 0, range(20_000)), size, scale, ratio)
    ours = np.stack([found.top, found.left, found.height, found.width], 1)
    image = Image.new("L", size[::-1])
    random.seed(0)
    theirs = np.array([
        RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(20_000)
    ])  # fmt: skip
    for of in (
        lambda x: x[:, 2] * x[:, 3], lambda x: x[:, 3] / x[:, 2], lambda x: x[:, 0],
        lambda x: x[:, 1], lambda x: x[:, 0] * x[:, 1],
    ):  # fmt: skip
        own, other = of(ours), of(theirs)
        error = math.sqrt(own.var() / len(own) + other.var() / len(other))
        assert abs(own.mean() - other.mean()) <= 6 * error


def test_the_shares_that_are_mirrored_and_resampled_bicubic():
    """Within six standard errors of what is asked for."""
    numbers = draws.uniform(1, 0, range(20_000))
    error = 6 * math.sqrt(0.25 / len(numbers))
    for probability in (0.0, 0.3, 1.0):
        assert abs(draws.flips(numbers, probability).mean() - probability) <= error
    assert not draws.flips(numbers, 0.0).any() and draws.flips(numbers, 1.0).all()
    assert draws.bicubic(numbers, "bicubic").all()
    assert not draws.bicubic(numbers, "bilinear").any()
    drawn = draws.bicubic(numbers, "random")
    assert abs(drawn.mean() - 0.5) <= error
    assert abs((drawn & draws.flips(numbers, 0.5)).mean() - 0.25) <= error


def test_the_rectangles_that_are_erased():
    """The share asked for, of 2 % to a third of the area as far as whole pixels go, all inside;
    noise there and the image elsewhere."""
    numbers = draws.uniform(3, 0, range(20_000))
    box, at = draws.erased(numbers, (32, 24), 0.25, 256)
    has = box.height > 0
    assert abs(has.mean() - 0.25) <= 6 * math.sqrt(0.25 * 0.75 / len(has))
    area = (box.height * box.width)[has] / (32 * 24)
    slack = (box.height + box.width)[has] / 2 / (32 * 24) + 1e-3  # half a pixel on either side
    assert (area >= 0.02 - slack).all() and (area <= 1 / 3 + slack).all()
    assert (box.top >= 0).all() and (box.left >= 0).all()
    assert (box.top + box.height <= 32).all() and (box.left + box.width <= 24).all()
    assert at.min() >= 0 and at.max() < 256

    rows = np.flatnonzero(has)[:5].tolist() + np.flatnonzero(~has)[:3].tolist()
    x, noise = torch.zeros(8, 3, 32, 32), torch.randn(3, 40, 40)
    sides = [torch.from_numpy(s[rows]) for s in (box.top, box.left, box.height, box.width)]
    where = torch.from_numpy(at[rows]) % 40
    done = colour.erase(x, tuple(sides), noise, where)
    for i, row in enumerate(rows):
        expected = torch.zeros(3, 32, 32)
        for y in range(box.top[row], box.top[row] + box.height[row]):
            for across in range(box.left[row], box.left[row] + box.width[row]):
                expected[:, y, across] = noise[
                    :, (y + int(where[i, 0])) % 40, (across + int(where[i, 1])) % 40
                ]
        assert torch.equal(done[i], expected)


# The batches


def plain(root, **more):
    """Nothing random but the order."""
    return DataConfig(
        **{"data_dir": root, "batch_size": 8, "workers": 0, "scale": (1.0, 1.0),
           "ratio": (1.0, 1.0), "hflip": 0, **more}
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_without_augmentation_both_loaders_give_the_same_bits(digit_tree, workers, monkeypatch):
    monkeypatch.setattr(kept, "DECODED", 5)  # several batches are decoded
    ours = loaders(plain(digit_tree, on_device=True, workers=workers))
    theirs = loaders(plain(digit_tree))
    assert len(ours.train) == len(theirs.train) and len(ours.val) == len(theirs.val)
    assert len(ours.val.dataset) == len(theirs.val.dataset)
    for epoch in range(2):
        for both in (ours, theirs):
            both.batches.set_epoch(epoch)
        for own, other in zip(ours.train, theirs.train, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    for own, other in zip(ours.val, theirs.val, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


AUGMENTED = {
    "on_device": True, "batch_size": 4, "workers": 0, "color_jitter": 0.4, "reprob": 0.5,
    "interpolation": "random",
}  # fmt: skip


def test_a_batch_depends_on_its_place_alone(digit_tree):
    config = DataConfig(data_dir=digit_tree, **AUGMENTED)
    whole, later = loaders(config), loaders(config)
    whole.batches.set_epoch(2)
    later.batches.set_epoch(2, first=3)
    batches = list(whole.train)
    for own, other in zip(batches[3:], later.train, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    whole.batches.set_epoch(3)
    assert not torch.equal(next(iter(whole.train))[0], batches[0][0])
    assert not torch.equal(next(iter(loaders(config, seed=1).train))[0], batches[0][0])


def test_two_processes_have_the_images_of_one(digit_tree):
    config = DataConfig(data_dir=digit_tree, **AUGMENTED)
    whole = loaders(config.model_copy(update={"batch_size": 8}))
    parts = [loaders(config, rank=rank, world=2) for rank in range(2)]
    for together, *own in zip(whole.train, *(part.train for part in parts), strict=True):
        expected = {row.numpy().tobytes() for row in together[0]}
        assert {row.numpy().tobytes() for part in own for row in part[0]} == expected


def test_five_processes_evaluate_every_image_once(digit_tree):
    config = DataConfig(data_dir=digit_tree, **AUGMENTED)
    labels, positions = [], []
    for rank in range(5):
        for images_, target in loaders(config, rank=rank, world=5).val:
            labels += target[target >= 0].tolist()
            positions += (-1 - target[target < 0]).tolist()
            assert images_[target < 0].abs().sum() == 0
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert positions == [12] * 3  # three places of 15 have no image


def test_images_that_cannot_be_read(own_digit_tree):
    """Half of the training images: whatever is drawn in place of one may be another such."""
    config = DataConfig(data_dir=own_digit_tree, max_unreadable=0.6, **AUGMENTED)
    split = find_split(config)
    names = [split.train.name(i) for i in split.train_indices]
    bad = [i for i in range(36) if i % 2]
    for i in bad:
        Path(names[i]).write_bytes(b"no image")
    lost = Path(split.val.name(split.val_indices[7]))
    lost.write_bytes(b"")
    found = loaders(config)
    assert found.unreadable == {"training": bad, "held-out": [7]}
    told = [x for _, _, positions in found.train for x in positions.tolist() if x >= 0]
    assert sorted(told) == bad
    for images_, target, _ in found.train:
        assert images_.abs().amax((1, 2, 3)).min() > 0 and target.min() >= 0
    assert set(found.train.replaced.values()) <= set(range(36)) - set(bad)
    targets = torch.cat([target for _, target in found.val])
    assert targets[7] == -8 and (targets < 0).sum() == 1
    assert torch.cat([x for x, _ in found.val])[7].abs().max() == 0


def test_too_many_that_cannot_be_read_are_told_before_training(own_digit_tree, tmp_path, capsys):
    broken = sorted((own_digit_tree / "train" / "digit1").iterdir())[0]
    broken.write_bytes(b"no image")
    flags = ["--data-dir", str(own_digit_tree), "--run-dir", str(tmp_path / "run"), *SMALL_MODEL]
    assert main(["train", *flags, "--on-device", "--workers", "0", "--batch-size", "8"]) == 2
    error = capsys.readouterr().err
    assert f"cannot read image {broken}" in error and "1 of 36 training images" in error
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["unreadable"]


def test_images_of_several_sizes_are_cut_to_one_if_asked(own_digit_tree):
    path = sorted((own_digit_tree / "train" / "digit1").iterdir())[0]
    Image.open(path).resize((30, 20)).save(path)
    config = DataConfig(data_dir=own_digit_tree, **AUGMENTED)
    message = rf"{path.name} is 20x30, \S+ 32x32; on_device_size=SIDE makes all training images"
    with pytest.raises(UserError, match=message):
        loaders(config)
    square = loaders(config.model_copy(update={"on_device_size": 12}))
    assert square.train.kept.images.shape[1:] == (3, 12, 12)
    cut = F.center_crop(
        F.resize(Image.open(path).convert("RGB"), 12, F.InterpolationMode.BICUBIC), 12
    )
    assert any(torch.equal(F.pil_to_tensor(cut), image) for image in square.train.kept.images)


def test_too_little_memory_is_one_line(digit_tree, monkeypatch):
    config = DataConfig(data_dir=digit_tree, **AUGMENTED)
    needs = r"data\.on_device needs 0\.00 GiB for 36 training images of 32x32, "
    with monkeypatch.context() as patch:
        patch.setattr(kept, "free_memory", lambda device: 1000)
        with pytest.raises(UserError, match=needs + r"0\.00 GiB are free on cpu; on_device_size="):
            loaders(config)

    def full(*_, **__):  # others took what was free
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kept.torch, "zeros", full)
    with pytest.raises(UserError, match=needs + "which cpu does not have free"):
        loaders(config)


def test_no_image_that_can_be_read(own_digit_tree):
    for path in (own_digit_tree / "val").rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 12 held-out images can be read"):
        loaders(DataConfig(data_dir=own_digit_tree, **AUGMENTED))


def test_a_policy_of_pillows_is_refused():
    with pytest.raises(ValueError, match=r"on_device takes no auto_augment=rand-m9; crop, hflip"):
        DataConfig(on_device=True, auto_augment="rand-m9")
    with pytest.raises(ValueError, match=r"on_device_size=64 has no effect without on_device"):
        DataConfig(on_device_size=64)
    with pytest.raises(ValueError, match=r"less than or equal to 4096"):
        DataConfig(on_device=True, on_device_size=30_000)

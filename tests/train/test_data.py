"""Which images are whose, and what comes out of the loaders."""

import io
import itertools
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from metala_vision.build import create_model
from metala_vision.config import DataConfig, ModelConfig
from metala_vision.config_file import load_config
from metala_vision.data import create_loaders
from metala_vision.errors import UserError
from metala_vision.sampling import EpochBatches, Key
from metala_vision.sources import DigitsSource, convert
from metala_vision.splits import DATA_VARIABLE, find_split


def loaders(data, model=None, seed=0):
    model = model or ModelConfig(
        model="metala_nano", img_size=32, model_kwargs={"embed_dim": 32, "num_heads": 1, "depth": 1}
    )
    split = find_split(data)
    return create_loaders(data, model, create_model(model, split.num_classes), split, seed)


def test_a_tree_with_train_and_val(digit_tree):
    split = find_split(DataConfig(data_dir=digit_tree))
    assert split.train.classes == ["digit0", "digit1", "digit2"] == split.val.classes
    assert len(split.train_indices) == 36 and len(split.val_indices) == 12


def test_the_variable_names_the_folder(digit_tree, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(digit_tree))
    assert len(find_split(DataConfig()).train_indices) == 36


@pytest.mark.parametrize("flat", [False, True], ids=["train-only", "flat"])
def test_holding_out_a_fraction_of_each_class(own_digit_tree, flat):
    shutil.rmtree(own_digit_tree / "val")
    root = own_digit_tree / "train" if flat else own_digit_tree
    split = find_split(DataConfig(data_dir=root, val_fraction=0.25))
    assert not set(split.train_indices) & set(split.val_indices)
    assert len(split.train_indices) + len(split.val_indices) == 36
    held = [split.val.targets[i] for i in split.val_indices]
    assert [held.count(c) for c in range(3)] == [3, 3, 3]
    again = find_split(DataConfig(data_dir=root, val_fraction=0.25))
    assert again.val_indices == split.val_indices
    other = find_split(DataConfig(data_dir=root, val_fraction=0.25, split_seed=1))
    assert other.val_indices != split.val_indices


@pytest.mark.parametrize("held_out", [False, True], ids=["val", "val-fraction"])
def test_some_classes_are_those_images_with_labels_from_0(digit_tree, own_digit_tree, held_out):
    root, fraction = digit_tree, None
    if held_out:
        shutil.rmtree(own_digit_tree / "val")
        root, fraction = own_digit_tree, 0.25
    whole = find_split(DataConfig(data_dir=root, val_fraction=fraction))
    part = find_split(DataConfig(data_dir=root, val_fraction=fraction, class_range=(1, 3)))
    assert part.train.classes == part.val.classes == ["digit1", "digit2"]
    for source, indices, of_all, all_indices in (
        (part.train, part.train_indices, whole.train, whole.train_indices),
        (part.val, part.val_indices, whole.val, whole.val_indices),
    ):
        found = [(source.name(i), source.key(i), source.targets[i]) for i in indices]
        assert found == [
            (of_all.name(i), of_all.key(i), of_all.targets[i] - 1)
            for i in all_indices
            if of_all.targets[i] >= 1
        ]
        assert np.array_equal(source.image(indices[0]), of_all.image(source.indices[indices[0]]))
    assert part.fingerprint != whole.fingerprint


def test_some_classes_of_too_few_or_without_images(own_digit_tree):
    with pytest.raises(UserError, match=r"data\.class_range=1 4: there are 3 classes"):
        find_split(DataConfig(data_dir=own_digit_tree, class_range=(1, 4)))
    for name in ("digit1", "digit2"):
        shutil.rmtree(own_digit_tree / "val" / name)
    with pytest.raises(UserError, match="no image of these classes"):
        find_split(DataConfig(data_dir=own_digit_tree, class_range=(1, 3)))
    for pair in ((1, 2), (-1, 3), (3, 1)):
        with pytest.raises(ValueError, match="at least two classes"):
            DataConfig(class_range=pair)


def test_a_class_missing_in_val_keeps_the_labels(own_digit_tree):
    shutil.rmtree(own_digit_tree / "val" / "digit0")
    split = find_split(DataConfig(data_dir=own_digit_tree))
    assert set(split.val.targets) == {1, 2}


def test_the_class_is_the_first_folder_and_strays_are_left_out(own_digit_tree):
    train = own_digit_tree / "train"
    for label in range(3):
        images = sorted((train / f"digit{label}").iterdir())
        for part in ("p0", "p1"):
            (train / f"digit{label}" / part).mkdir()
        for i, image in enumerate(images):
            image.rename(image.parent / f"p{i % 2}" / image.name)
    shutil.copy(own_digit_tree / "val" / "digit0" / "12.png", train / "stray.png")
    for part in ("train", "val"):
        (own_digit_tree / part / ".ipynb_checkpoints").mkdir()
    split = find_split(DataConfig(data_dir=own_digit_tree))
    assert split.num_classes == 3 and len(split.train_indices) == 36
    assert [split.train.targets.count(c) for c in range(3)] == [12, 12, 12]


def test_other_formats_are_read(own_digit_tree):
    for image in (own_digit_tree / "train" / "digit1").iterdir():
        Image.open(image).save(image.with_suffix(".webp"))
        image.unlink()
    split = find_split(DataConfig(data_dir=own_digit_tree))
    assert split.train.targets.count(1) == 12 and split.train.image(12).size == (32, 32)


def test_sixteen_bit_grey_is_scaled():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(convert(Image.fromarray(ramp), "L"))
    np.testing.assert_array_equal(pixels, ramp // 256)


@pytest.mark.parametrize("name", ["imagenet1k/metala_tiny", "imagenet1k/metala_small"])
def test_the_recipes_augmentation_runs_on_many_images(name):
    """RandAugment draws its operations and strengths: 200 images meet every extreme."""
    data = load_config(name).data.model_copy(
        update={"dataset": "digits", "val_fraction": 0.2, "workers": 0, "batch_size": 50}
    )
    made = loaders(data)
    batches = itertools.islice(made.train, 4)
    assert all(torch.isfinite(images).all() for images, *_ in batches)


def test_the_digits_are_the_real_ones():
    source = DigitsSource()
    assert len(source.targets) == 1797 and len(source.classes) == 10
    pixels = np.asarray(source.image(0))
    assert pixels.shape == (8, 8) and pixels.max() == 239  # 15 of 16


def test_the_quickstart_holds_out_a_fifth():
    split = find_split(load_config("quickstart").data)
    assert len(split.val_indices) == 360 and len(split.train_indices) == 1437


def test_batches_have_the_model_size_and_normalisation(digit_tree):
    data = DataConfig(
        data_dir=digit_tree, batch_size=8, workers=0, mean=(0.0,), std=(1.0,), crop_pct=1.0
    )
    made = loaders(data)
    images, labels = next(iter(made.val))
    assert images.shape == (8, 3, 32, 32) and labels.dtype == torch.int64
    file = digit_tree / "val" / "digit0" / "12.png"
    expected = np.asarray(Image.open(file)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(images[0].numpy(), expected, atol=1e-6)
    assert made.preprocessing["input_size"] == (3, 32, 32)


def test_grey_images_for_one_channel(digit_tree):
    model = ModelConfig(
        model="metala_nano", img_size=32, in_chans=1,
        model_kwargs={"embed_dim": 32, "num_heads": 1, "depth": 1},
    )  # fmt: skip
    data = DataConfig(data_dir=digit_tree, batch_size=4, workers=0, mean=(0.5,), std=(0.5,))
    assert next(iter(loaders(data, model).val))[0].shape == (4, 1, 32, 32)


def test_the_order_follows_the_seed(digit_tree):
    def first_labels(seed):
        data = DataConfig(data_dir=digit_tree, batch_size=36, workers=0)
        return next(iter(loaders(data, seed=seed).train))[1].tolist()

    assert first_labels(1) == first_labels(1) != first_labels(2)


def test_workers_and_batch_size_reach_the_loaders(digit_tree):
    made = loaders(DataConfig(data_dir=digit_tree, batch_size=5, workers=2))
    assert made.train.num_workers == made.val.num_workers == 2
    assert made.batches.batch_size == made.val.batch_size == 5


def test_an_incomplete_last_batch_is_dropped_in_training_only(digit_tree):
    made = loaders(DataConfig(data_dir=digit_tree, batch_size=10, workers=0))
    assert len(made.train) == 3 and sum(len(y) for _, y in made.val) == 12
    tiny = loaders(DataConfig(data_dir=digit_tree, batch_size=100, workers=0))
    assert len(tiny.train) == 1


def test_normalisation_of_another_width_is_refused(digit_tree):
    with pytest.raises(UserError, match=r"data\.mean has 2 values; 1 or in_chans=3"):
        loaders(DataConfig(data_dir=digit_tree, mean=(0.1, 0.2), workers=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_marked_and_in_training_replaced(own_digit_tree, workers):
    for bad in ("val/digit1/13.png", "train/digit0/02.png"):
        path = own_digit_tree / bad
        path.write_bytes(path.read_bytes()[:60])
    made = loaders(DataConfig(data_dir=own_digit_tree, batch_size=4, workers=workers))
    labels = torch.cat([target for _, target in made.val]).tolist()
    assert labels[5] == -1 - 5 and sorted(labels)[1:] == [0] * 4 + [1] * 3 + [2] * 4
    seen = [torch.cat(x) for x in zip(*((t, bad) for _, t, bad in made.train), strict=True)]
    assert seen[1].tolist().count(2) == 1 and seen[1].tolist().count(-1) == 35
    assert (seen[0] >= 0).all()  # the replacement has a label of its own
    again = [target for _, target, _ in made.train]
    assert torch.equal(torch.cat(again), seen[0])


def test_one_unreadable_image_of_ten_never_ends_a_run(own_digit_tree):
    """A replacement may be drawn that is the image itself."""
    for path in sorted(own_digit_tree.rglob("train/*/*.png"))[10:]:
        if path.parent.name == "digit0" or path.name > "00.png":
            path.unlink()
    left = sorted(own_digit_tree.rglob("train/*/*.png"))
    assert 10 <= len(left) <= 14
    left[3].write_bytes(b"")
    made = loaders(DataConfig(data_dir=own_digit_tree, batch_size=2, workers=0))
    for epoch in range(100):
        image, _, unreadable = made.train.dataset[Key(epoch, 0, 3)]
        assert unreadable == 3 and image.abs().sum() > 0


def test_every_image_unreadable_is_an_error(own_digit_tree):
    for path in own_digit_tree.rglob("train/*/*.png"):
        path.write_bytes(b"")
    made = loaders(DataConfig(data_dir=own_digit_tree, batch_size=4, workers=0))
    with pytest.raises(UserError, match=r"20 images one after the other: cannot read image .*png"):
        next(iter(made.train))


def draws(**options):
    """Pixels and labels of an epoch on the digits."""
    epoch = options.pop("epoch", 0)
    data = DataConfig(
        **{"dataset": "digits", "batch_size": 100, "workers": 0, "auto_augment": "rand-m9-mstd0.5",
           "reprob": 0.5, **options}
    )  # fmt: skip
    made = loaders(data, ModelConfig(model="metala_nano", img_size=32))
    made.batches.set_epoch(epoch)
    images, targets, _ = (torch.cat(x) for x in zip(*itertools.islice(made.train, 3), strict=True))
    return images, targets


def test_pixels_are_a_function_of_seed_epoch_and_place():
    images, targets = draws()
    for same in ({"workers": 2}, {"batch_size": 60}):
        others = draws(**same)
        n = min(len(images), len(others[0]))
        assert torch.equal(others[0][:n], images[:n]) and torch.equal(others[1][:n], targets[:n])
    assert not torch.equal(draws(epoch=1)[1], targets)


def test_drawing_leaves_the_generators_of_the_run_alone(digit_tree):
    made = loaders(DataConfig(data_dir=digit_tree, batch_size=4, workers=0, color_jitter=0.4))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    list(made.train)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_draws_every_image_once_or_a_third_of_them_three_times(repeats):
    batches = EpochBatches(100, 10, seed=0, repeats=repeats)
    keys = [key for batch in batches for key in batch]
    assert [key.place for key in keys] == list(range(100))
    counts = np.bincount([key.index for key in keys], minlength=100)
    assert set(counts[counts > 0]) <= {repeats, 100 % repeats or repeats}
    assert (counts > 0).sum() == -(-100 // repeats)
    batches.set_epoch(1)
    assert [key.index for key in next(iter(batches))] != [key.index for key in keys[:10]]


def saved(folder, name, image, **options):
    path = folder / name
    image.save(path, **options)
    return path


FORMATS = ("cmyk.jpg", "grey.jpg", "palette.png", "transparent.png", "alpha.png", "sixteen.png",
           "turned.jpg", "named_png.png", "animated.webp", "bitmap.bmp", "web.webp", "one.tiff",
)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_imagenet_and_the_web_hold(name, own_digit_tree):
    """Each stands as the only image of a class and comes out as three channels of numbers."""
    rgb = Image.fromarray((np.indices((40, 50)).sum(0) % 256).astype(np.uint8)).convert("RGB")
    folder = own_digit_tree / "train" / "digit0"
    for path in folder.iterdir():
        path.unlink()
    palette = rgb.convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    {
        "cmyk.jpg": lambda: saved(folder, name, rgb.convert("CMYK")),
        "grey.jpg": lambda: saved(folder, name, rgb.convert("L")),
        "palette.png": lambda: saved(folder, name, palette),
        "transparent.png": lambda: saved(folder, name, palette, transparency=bytes(range(256))),
        "alpha.png": lambda: saved(folder, name, rgb.convert("RGBA")),
        "sixteen.png": lambda: saved(
            folder, name, Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30)
        ),
        "turned.jpg": lambda: saved(folder, name, rgb, exif=exif),
        "named_png.png": lambda: saved(folder, name, rgb, format="JPEG"),
        "animated.webp": lambda: saved(folder, name, rgb, save_all=True, append_images=[palette]),
        "bitmap.bmp": lambda: saved(folder, name, rgb),
        "web.webp": lambda: saved(folder, name, rgb),
        "one.tiff": lambda: saved(folder, name, rgb.convert("1")),
    }[name]()
    made = loaders(DataConfig(data_dir=own_digit_tree, batch_size=25, workers=0))
    (images, _, unreadable) = next(iter(made.train))
    assert torch.isfinite(images).all() and images.shape[1] == 3 and (unreadable == -1).all()


def test_200_fuzzed_files_never_end_a_run(own_digit_tree):
    """Bytes changed, cut, repeated and removed: each file is read or counted, nothing else."""
    rng = np.random.default_rng(0)
    good = [path.read_bytes() for path in sorted(own_digit_tree.rglob("train/*/*.png"))[:4]]
    picture = Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
    for ending in ("jpeg", "gif", "tiff", "webp", "bmp"):
        buffer = io.BytesIO()
        picture.save(buffer, ending)
        good.append(buffer.getvalue())
    folder = own_digit_tree / "train" / "digit1"
    for i in range(200):
        data = bytearray(good[i % len(good)])
        for _ in range(int(rng.integers(1, 5))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        start = int(rng.integers(len(data)))
        data = [data, data, data[:start], data + data, data, data[start:]][i % 6]
        (folder / f"fuzz{i:03d}.jpg").write_bytes(data)
        shutil.copy(folder / "00.png", folder / f"good{i:03d}.png")
    made = loaders(DataConfig(data_dir=own_digit_tree, batch_size=109, workers=0))
    found = list(made.train)
    assert sum(len(target) for _, target, _ in found) == 436
    count = sum(int((bad >= 0).sum()) for _, _, bad in found)
    assert 30 < count < 150
    assert all(torch.isfinite(images).all() for images, _, _ in found)

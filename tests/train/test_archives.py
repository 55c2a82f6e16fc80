"""The same images as a tar, as WebDataset shards, as a Hugging Face data set: the same run."""

import io
import shutil
import tarfile
from glob import glob
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from metala_vision.archives import read_shards, read_tar
from metala_vision.cli import main
from metala_vision.config import DataConfig
from metala_vision.errors import OwnError, UnreadableImage, UserError
from metala_vision.sources import FolderSource, fingerprint
from metala_vision.splits import find_split
from tests.conftest import SMALL_MODEL
from tests.train.test_train import metrics

PARTS = ("train", "val")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def packed(digit_tree, tmp_path_factory) -> Path:
    """Folders tar (one a part), tars (one a class), wds (two shards a part), hub (parquet)."""
    root = tmp_path_factory.mktemp("packed")
    for kind in ("tar", "tars", "wds"):
        (root / kind).mkdir()
    for part in PARTS:
        with tarfile.open(root / "tar" / f"{part}.tar", "w") as archive:
            archive.add(digit_tree / part, ".")
        (root / "tars" / part).mkdir()
        for folder in sorted((digit_tree / part).iterdir()):
            with tarfile.open(root / "tars" / part / f"{folder.name}.tar", "w") as archive:
                for image in sorted(folder.iterdir()):
                    add(archive, image.name, image.read_bytes())
        files = sorted((digit_tree / part).rglob("*.png"))
        middle = len(files) // 2
        for shard, own in enumerate((files[:middle], files[middle:])):
            with tarfile.open(root / "wds" / f"digits-{part}-{shard:04d}.tar", "w") as archive:
                for i, image in enumerate(own):
                    add(archive, f"{i:06d}.png", image.read_bytes())
                    add(archive, f"{i:06d}.cls", image.parent.name[-1].encode())
                    add(archive, f"{i:06d}.json", b"{}")
    return root


@pytest.fixture(scope="module")
def hub(digit_tree, tmp_path_factory) -> Path:
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["digit0", "digit1", "digit2"])
    )
    for part in PARTS:
        files = sorted((digit_tree / part).rglob("*.png"))
        rows = {
            "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
            "label": [int(file.parent.name[-1]) for file in files],
        }
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(root / f"{'validation' if part == 'val' else part}-0.parquet")
    return root


def pixels(source):
    return [np.asarray(source.image(i)) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["tar", "tars", "wds", "hub"])
def test_an_archive_holds_the_images_of_the_folders(kind, digit_tree, packed, request, tmp_path):
    root = request.getfixturevalue("hub") if kind == "hub" else packed / kind
    name = {"tars": "tar", "hub": "hfds"}.get(kind, kind)
    split = find_split(DataConfig(dataset=name, data_dir=root))
    expected = find_split(DataConfig(data_dir=digit_tree))
    if kind != "wds":
        assert split.train.classes == expected.train.classes
    for source, like in ((split.train, expected.train), (split.val, expected.val)):
        # timm's reader sorts by name alone
        ours = sorted(zip(source.targets, (x.tobytes() for x in pixels(source)), strict=True))
        theirs = sorted(zip(like.targets, (x.tobytes() for x in pixels(like)), strict=True))
        assert ours == theirs
        assert len({source.name(i) for i in range(len(source))}) == len(source)
    again = find_split(DataConfig(dataset=name, data_dir=root))
    assert split.fingerprint == again.fingerprint


def test_a_run_on_shards_is_the_run_on_folders(packed, digit_tree, tmp_path):
    from accelerate.state import AcceleratorState

    flags = [*SMALL_MODEL, "--batch-size", "12", "--workers", "2", "--epochs", "1"]
    for name, root in (("folder", digit_tree), ("wds", packed / "wds")):
        where = ["--data-dir", str(root), "--dataset", name, "--run-dir", str(tmp_path / name)]
        assert main(["train", *flags, *where]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)
    assert metrics(tmp_path / "folder") == metrics(tmp_path / "wds")


def test_forked_workers_read_an_archive_that_is_open_already(packed):
    class Sums(Dataset):
        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            return int(np.asarray(self.source.image(index)).astype(int).sum())

    source = read_tar(packed / "tar" / "train.tar")
    expected = [int(x.astype(int).sum()) for x in pixels(source)]
    loader = DataLoader(Sums(source), batch_size=3, num_workers=2)
    assert [int(x) for batch in loader for x in batch] == expected


def test_holding_out_from_one_tar(packed, tmp_path):
    shutil.copy(packed / "tar" / "train.tar", tmp_path / "train.tar")
    split = find_split(DataConfig(dataset="tar", data_dir=tmp_path, val_fraction=0.25))
    assert (len(split.train_indices), len(split.val_indices)) == (27, 9)


def test_parts_of_another_name(digit_tree, tmp_path):
    shutil.copytree(digit_tree / "train", tmp_path / "first")
    shutil.copytree(digit_tree / "val", tmp_path / "second")
    config = DataConfig(data_dir=tmp_path, train_split="first", val_split="second")
    assert len(find_split(config).train_indices) == 36


def test_labels_may_be_names(tmp_path):
    def shard(name, labels):
        with tarfile.open(tmp_path / name, "w") as archive:
            for i, label in enumerate(labels):
                image = io.BytesIO()
                Image.new("RGB", (4, 4)).save(image, "jpeg")
                add(archive, f"part/{i}.jpg", image.getvalue())
                add(archive, f"part/{i}.cls", label.encode())
        return [tmp_path / name]

    train = read_shards(shard("a.tar", ["dog", "cat", "dog"]))
    assert train.classes == ["cat", "dog"] and train.targets == [1, 0, 1]
    assert read_shards(shard("b.tar", ["dog"]), train.classes).targets == [1]
    with pytest.raises(UserError, match="has class 'owl', which the training images lack"):
        read_shards(shard("c.tar", ["owl"]), train.classes)
    with pytest.raises(UserError, match=r"no images in .*: members that end in tif are read"):
        read_shards(shard("d.tar", ["dog"]), input_key="tif")
    with pytest.raises(UserError, match=r"image part/0 has no label part/0\.index"):
        read_shards(shard("e.tar", ["dog"]), target_key="index")


def test_damage_is_named(packed, tmp_path):
    whole = (packed / "wds" / "digits-train-0000.tar").read_bytes()
    cut = tmp_path / "train-0.tar"
    for length in (0, 100, 700, 5000, 20_000):
        cut.write_bytes(whole[:length])
        for read in (read_shards, lambda files: read_tar(files[0])):
            try:
                source = read([cut])
            except UserError as error:
                assert str(cut) in error.line and "\n" not in str(error)
                continue
            for index in range(len(source)):
                try:
                    source.image(index)
                except UnreadableImage as error:
                    assert str(cut) in error.line
    compressed = tmp_path / "train.tar"
    with tarfile.open(compressed, "w:gz") as archive:
        add(archive, "a.png", b"x")
    with pytest.raises(UserError, match=r"cannot read .*train\.tar as an uncompressed tar"):
        read_shards([compressed])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"dataset": "tar"}, r"needs train\.tar or tar files in train/, found data"),
        ({"dataset": "wds"}, r"needs train\.tar .* or NAME-train-0000\.tar, found data"),
        ({"dataset": "tar", "target_key": "x"}, "input_key and target_key are for dataset wds"),
        ({"input_key": "x"}, r"data\.input_key is for dataset wds and hfds, not folder"),
        ({"dataset": "hfds/some/name"}, "one of both"),
        ({"dataset": "hfds"}, "cannot load .*train"),
    ],
)
def test_wrong_input_is_one_line(flags, line, tmp_path):
    (tmp_path / "data").mkdir()
    if flags.get("dataset") == "hfds":
        pytest.importorskip("datasets")
    with pytest.raises(UserError, match=line) as caught:
        find_split(DataConfig(data_dir=tmp_path, **flags))
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_of_data_is_refused():
    with pytest.raises(ValueError, match=r"folder, tar, wds, .*oxford_pets and hfds/NAME"):
        DataConfig(dataset="zip")


def test_the_fingerprint_follows_images_and_labels(own_digit_tree, tmp_path):
    def now():
        return fingerprint(FolderSource(own_digit_tree / "train"))

    before = now()
    moved = Path(shutil.copytree(own_digit_tree / "train", tmp_path / "elsewhere"))
    assert fingerprint(FolderSource(moved)) == before
    image = own_digit_tree / "train" / "digit0" / "00.png"
    image.rename(image.with_name("zz.png"))
    assert now() != before


def test_few_descriptors_are_enough_for_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("metala_vision.archives.OPEN_FILES", 2)
    files = [shard_of(tmp_path / f"train-{i}.tar", [str(i % 2)]) for i in range(9)]
    source = read_shards(files)
    for _ in range(2):
        assert all(source.image(i).size == (4, 4) for i in range(9))
        assert len(source.opened) == 2
    files[3].unlink()
    source = read_shards([f for f in files if f.exists()])
    files[4].unlink()
    with pytest.raises(OwnError, match=r"cannot open .*train-4\.tar: No such file"):
        source.image(3)


def shard_of(path, labels):
    with tarfile.open(path, "w") as archive:
        for i, label in enumerate(labels):
            image = io.BytesIO()
            Image.new("RGB", (4, 4)).save(image, "jpeg")
            add(archive, f"{i}.jpg", image.getvalue())
            add(archive, f"{i}.cls", label.encode())
    return path


def test_the_order_of_a_folder_does_not_matter(packed, monkeypatch):
    first = read_tar(packed / "tars" / "train")
    from timm.data.readers import reader_image_in_tar

    monkeypatch.setattr(reader_image_in_tar, "glob", lambda *a, **k: sorted(glob(*a, **k))[::-1])
    again = read_tar(packed / "tars" / "train")
    assert fingerprint(again) == fingerprint(first) and again.targets == first.targets


def test_labels_that_are_names_in_training_are_names_in_evaluation(tmp_path):
    train = read_shards([shard_of(tmp_path / "a.tar", ["1", "2", "cat"])])
    assert train.classes == ["1", "2", "cat"]
    assert read_shards([shard_of(tmp_path / "b.tar", ["2", "1"])], train.classes).targets == [1, 0]


def test_what_a_mac_adds_is_no_image_and_a_link_is_refused(tmp_path):
    path = shard_of(tmp_path / "a.tar", ["1", "0"])
    with tarfile.open(path, "a") as archive:
        for name in ("._0.jpg", "__MACOSX/1.jpg", ".hidden/2.jpg"):
            add(archive, name, b"x")
    assert len(read_shards([path])) == 2
    tree = tmp_path / "tree.tar"
    with tarfile.open(tree, "w") as archive:
        for name in ("a/0.jpg", "b/0.jpg", "a/._0.jpg", ".hid/0.jpg"):
            add(archive, name, b"x")
    source = read_tar(tree)
    assert source.classes == ["a", "b"] and source.keys == ["a/0.jpg", "b/0.jpg"]
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("9.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"9\.jpg is a link; shards hold files"):
        read_shards([path])


def test_images_without_a_label_are_refused(hub, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "png")
    for part, labels in (("train", [0, 1]), ("validation", [1, -1])):
        rows = {"image": [{"bytes": image.getvalue(), "path": None}] * 2, "label": labels}
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(tmp_path / f"{part}-0.parquet")
    with pytest.raises(UserError, match=r"\[validation\] has images without a label"):
        find_split(DataConfig(dataset="hfds", data_dir=tmp_path))

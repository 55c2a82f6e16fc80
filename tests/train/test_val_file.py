"""Held-out images that a file lists: they are held out, the rest trains."""

import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metala_vision.cli import main
from metala_vision.compare import load_comparison
from metala_vision.compare.run import _write_configs
from metala_vision.config import DataConfig
from metala_vision.errors import UserError
from metala_vision.splits import find_split
from metala_vision.val_file import held_out
from tests.conftest import SMALL_MODEL
from tests.train._published import make_flowers, make_pets
from tests.train._runs import metrics


@pytest.fixture
def tree(own_digit_tree):
    """One tree of three classes, twelve images each."""
    shutil.rmtree(own_digit_tree / "val")
    return own_digit_tree / "train"


def split_of(root, file, **flags):
    return find_split(DataConfig(data_dir=root, val_file=file, **flags))


def keys(source, indices):
    return [source.key(i) for i in indices]


def write(path, *lines):
    path.write_bytes("\n".join([*lines, ""]).encode())
    return path


@pytest.mark.parametrize("flat", [False, True], ids=["train-only", "flat"])
def test_those_images_are_held_out_and_the_rest_trains(flat, tree, tmp_path):
    listed = ["digit2/00.png", "digit0/03.png", "digit0/11.png"]
    split = split_of(tree if flat else tree.parent, write(tmp_path / "val.txt", *listed))
    assert keys(split.val, split.val_indices) == sorted(listed)
    every = {f"digit{label}/{i:02d}.png" for label in range(3) for i in range(12)}
    assert set(keys(split.train, split.train_indices)) == every - set(listed)
    assert len(split.train_indices) == 33 and split.train.classes == split.val.classes


def test_what_windows_find_and_people_write(tree, tmp_path):
    file = tmp_path / "val.txt"
    file.write_bytes(
        b"\xef\xbb\xbfdigit0/00.png\r\n\r\n# more\r\n   \t\r\n./digit1/01.png  \r\ndigit2/02.png"
    )
    split = split_of(tree, file)
    assert keys(split.val, split.val_indices) == ["digit0/00.png", "digit1/01.png", "digit2/02.png"]


def test_names_that_are_odd(tree, tmp_path):
    (tree / "digit0").rename(tree / "#0")
    names = ["#0/a b.png", "#0/\x85\u2028.png", "#0/ü#.png", "#0/\udcff.png"]
    for i, name in enumerate(names):
        (tree / "#0" / f"{i:02d}.png").rename(tree / name)
    file = tmp_path / "val.txt"
    file.write_bytes("\n".join(f"./{name}" for name in names).encode(errors="surrogateescape"))
    split = split_of(tree, file)
    assert set(keys(split.val, split.val_indices)) == set(names)


class Listed:
    """Two classes of names in order, without images."""

    def __init__(self, names):
        self.names, self.classes = names, ["even", "odd"]
        self.targets = [i % 2 for i in range(len(names))]

    def __len__(self):
        return len(self.names)

    def key(self, index):
        return self.names[index]


NAMES = st.lists(
    st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs", "Z", "Cc"]),
            min_size=1),
    min_size=4, max_size=30, unique=True,
)  # fmt: skip


@given(data=st.data(), names=NAMES)
def test_the_parts_are_what_the_file_says(data, names, tmp_path_factory):
    """For any names, part of them, order, comments and line ends."""
    source = Listed([f"class/{name}.png" for name in names])
    places = list(range(len(names)))
    listed = data.draw(st.lists(st.sampled_from(places), min_size=1, unique=True))
    ends = data.draw(st.lists(st.sampled_from(["\n", "\r\n", " \n", "\n\n", "\n# x\n", "\n./"])))
    text = "".join(
        source.names[place] + (ends[i] if i < len(ends) and i + 1 < len(listed) else "\n")
        for i, place in enumerate(listed)
    )
    file = tmp_path_factory.mktemp("listed") / "val.txt"
    file.write_bytes(text.encode())
    whole = [own for own in (set(places[::2]), set(places[1::2])) if own <= set(listed)]
    if whole:
        with pytest.raises(UserError, match=r"holds out each image of class '(even|odd)'"):
            held_out(file, source, "the source")  # pyright: ignore[reportArgumentType]
        return
    train, val = held_out(file, source, "the source")  # pyright: ignore[reportArgumentType]
    assert val == sorted(listed) and train == sorted(set(places) - set(listed))


WRONG = [
    (b"", r"val\.txt names no image"),
    (b"# digit0/00.png\r\n\n", r"val\.txt names no image"),
    (b"digit0/00.png\ndigit0/zz.png\n", r"val\.txt, line 2: 'digit0/zz\.png' is no image of .*"
     r"which are as 'digit0/00\.png'"),
    (b"train/digit0/00.png\n", r"line 1: 'train/digit0/00\.png' is no image"),
    (b" digit0/00.png\n", r"line 1: ' digit0/00\.png' is no image"),
    (b"digit0\n", "line 1: 'digit0' is no image"),
    (b"\xff\xfed\0i\0\n\0", r"line 1: '\\udcff\\udcfed\\x00i\\x00' is no image"),
    (b"x" * 100_000, "line 1: 'xxx"),
    (b"digit0/00.png\n#\ndigit0/01.png\n./digit0/00.png\n",
     r"line 4: 'digit0/00\.png' stands in line 1 too"),
    ("\n".join(f"digit1/{i:02d}.png" for i in range(12)).encode(),
     "holds out each image of class 'digit1', none is left to train on"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "line"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_file_is_one_line(content, line, tree, tmp_path):
    file = tmp_path / "val.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        split_of(tree, file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_file_that_is_not_there(tree, tmp_path):
    for path, why in ((tmp_path / "no.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=rf"cannot read data\.val_file {path}: {why}"):
            split_of(tree, path)


def test_beside_another_way_to_hold_out(digit_tree, tree, tmp_path):
    file = write(tmp_path / "val.txt", "digit0/00.png")
    with pytest.raises(UserError, match=r"val_file=.* and val_fraction=0\.1 were both given"):
        split_of(tree, file, val_fraction=0.1)
    with pytest.raises(UserError, match=rf"val_file={file} was given, but .*val exists; drop one"):
        split_of(digit_tree, file)
    make_pets(tmp_path)
    with pytest.raises(UserError, match="holds out of the training part, and val_split=test"):
        split_of(tmp_path, file, dataset="oxford_pets", val_split="test")
    for name in ("digits", "hfds/some/name", "cifar100"):
        with pytest.raises(UserError, match=rf"is for dataset folder, tar, .* not {name}"):
            find_split(DataConfig(dataset=name, val_file=file))


def test_without_a_held_out_part_both_ways_are_named(tree):
    with pytest.raises(UserError, match=r"give --val-fraction 0\.1 or --val-file FILE$"):
        find_split(DataConfig(data_dir=tree))


def test_of_published_images(tmp_path):
    make_flowers(tmp_path)
    whole = find_split(DataConfig(dataset="flowers102", data_dir=tmp_path))
    name = whole.train.key(3)
    split = split_of(tmp_path, write(tmp_path / "val.txt", name), dataset="flowers102")
    assert keys(split.val, split.val_indices) == [name] and name.startswith("jpg/image_000")
    assert len(split.train_indices) == len(whole.train) - 1


def test_of_a_tar(tree, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name in ("digit0", "digit1"):
            archive.add(tree / name, name)
    file = write(tmp_path / "val.txt", "train.tar:digit0/05.png", "train.tar:digit1/00.png")
    split = split_of(tmp_path, file, dataset="tar")
    assert keys(split.val, split.val_indices) == file.read_text().split()
    assert len(split.train_indices) == 22


def test_some_classes_of_a_listed_part(tree, tmp_path):
    file = write(tmp_path / "val.txt", "digit0/00.png", "digit1/01.png", "digit2/02.png")
    part = split_of(tree, file, class_range=(1, 3))
    assert keys(part.val, part.val_indices) == ["digit1/01.png", "digit2/02.png"]
    assert [part.val.targets[i] for i in part.val_indices] == [0, 1]
    assert len(part.train_indices) == 22


def test_a_run_holds_out_what_the_file_says_and_may_move(tree, tmp_path, monkeypatch, capsys):
    """The run knows the file by what it says, wherever it lies."""
    listed = [f"digit{label}/{i:02d}.png" for label in range(3) for i in range(4)]
    write(tmp_path / "val.txt", *listed)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    flags = [*SMALL_MODEL, "--data-dir", str(tree), "--batch-size", "12", "--workers", "0"]
    flags += ["--epochs", "1", "--run-dir", str(run_dir)]
    assert main(["train", *flags, "--val-file", "val.txt"]) == 0
    assert "top-1" in capsys.readouterr().out
    assert [line["images"] for line in metrics(run_dir) if line["event"] == "eval"] == [12]
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["data"]["val_file"] == str(tmp_path / "val.txt")
    published = ["--out", str(tmp_path / "out"), "--license", "apache-2.0"]
    assert main(["weights", "publish", str(run_dir), *published]) == 0
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["data"]["val_file"] == "val.txt"  # and no place of this machine
    before = metrics(run_dir)
    shutil.move(tmp_path / "val.txt", tmp_path / "elsewhere.txt")
    for other, status in ((listed, 0), (listed[1:], 2)):
        AcceleratorState._reset_state(reset_partial_state=True)
        write(tmp_path / "elsewhere.txt", *other[::-1])
        resumed = ["--resume", str(run_dir), "--val-file", "elsewhere.txt"]
        assert main(["train", *resumed]) == status, capsys.readouterr().err
        assert metrics(run_dir) == before
    assert "the images are not those" in capsys.readouterr().err


def test_members_of_a_comparison_are_told_the_whole_path(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"dataset": "folder", "val_fraction": None, "data_dir": str(tree), "val_file": "val.txt"}
    values = {"recipe": "quickstart", "overrides": {"data": data}, "members": ["metala_nano"]}
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "out" / "configs").mkdir(parents=True)
    for path in _write_configs(load_comparison("mine.yaml"), tmp_path / "out"):
        config = yaml.safe_load(path.read_text())
        assert config["data"]["val_file"] == str(tmp_path / "val.txt")


def test_a_class_of_one_image_may_train(tree, tmp_path):
    """Where a fraction of each class could not be held out."""
    for path in sorted((tree / "digit1").iterdir())[1:]:
        path.unlink()
    split = split_of(tree, write(tmp_path / "val.txt", "digit0/00.png"))
    assert split.num_classes == 3 and len(split.val_indices) == 1
    assert isinstance(split.val.image(split.val_indices[0]), Image.Image)

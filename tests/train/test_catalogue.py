"""Published data sets: the images, labels and order that torchvision reads from the same files."""

import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from metala_vision.build import create_model
from metala_vision.catalogue import CATALOGUE
from metala_vision.cli import main
from metala_vision.config import DataConfig, ModelConfig
from metala_vision.config_values import DATASETS
from metala_vision.data import create_loaders
from metala_vision.errors import UnreadableImage, UserError
from metala_vision.sources import convert
from metala_vision.splits import DATA_VARIABLE, find_split
from tests.train._published import MAKERS, dump, make_cifar, make_flowers, make_pets, md5

NAMES = list(MAKERS)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """{data set: the folder that contains its folder}."""
    made = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, root in made.items():
        MAKERS[name](root)
    return made


@pytest.fixture
def root(request, tmp_path):
    """A copy of one data set that a test may damage."""
    MAKERS[request.param](tmp_path)
    return tmp_path


def split_of(name, root, **flags):
    return find_split(DataConfig(dataset=name, data_dir=root, **flags))


def pairs(source, indices=None):
    """Pixels as RGB and labels, in order."""
    indices = range(len(source)) if indices is None else indices
    images = (np.asarray(convert(source.image(i), "RGB")) for i in indices)
    return [(x.tobytes(), source.targets[i]) for x, i in zip(images, indices, strict=True)]


def expected(dataset):
    return [(np.asarray(image.convert("RGB")).tobytes(), label) for image, label in dataset]


def torchvision_cifar(monkeypatch, name, root, train):
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = root / kind.base_folder
    for key in ("train_list", "test_list"):
        files = [[file, md5(folder / file)] for file, _ in getattr(kind, key)]
        monkeypatch.setattr(kind, key, files)
    meta = {**kind.meta, "md5": md5(folder / kind.meta["filename"])}
    monkeypatch.setattr(kind, "meta", meta)
    return kind(root, train=train, download=False)


def test_the_catalogue_is_what_the_configuration_accepts():
    assert set(CATALOGUE) == set(NAMES) < set(DATASETS)


@pytest.mark.filterwarnings("ignore:dtype")  # torchvision's reader lets numpy warn of old flags
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_what_torchvision_reads(name, roots, monkeypatch):
    split = split_of(name, roots[name])
    for source, train in ((split.train, True), (split.val, False)):
        theirs = torchvision_cifar(monkeypatch, name, roots[name], train)
        assert source.classes == theirs.classes == ["airplane", "automobile", "bird"]
        assert pairs(source) == expected(theirs) and len({x for x, _ in pairs(source)}) > 5
    assert (len(split.train), len(split.val)) == ((30, 6) if name == "cifar10" else (12, 12))


def test_flowers_are_what_torchvision_reads(roots, monkeypatch):
    root = roots["flowers102"]
    files = datasets.Flowers102._file_dict
    found = {key: (file, md5(root / "flowers-102" / file)) for key, (file, _) in files.items()
             if file.endswith(".mat")}  # fmt: skip
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", {**files, **found})
    split = split_of("flowers102", root)
    for source, part in ((split.train, "train"), (split.val, "val")):
        assert pairs(source) == expected(datasets.Flowers102(root, part))
    both = split_of("flowers102", root, train_split="train+val")
    assert pairs(both.train) == pairs(split.train) + pairs(split.val)
    assert pairs(both.val) == expected(datasets.Flowers102(root, "test"))
    assert both.fingerprint == split_of("flowers102", root, train_split="trainval").fingerprint
    assert split.train.classes == ["1", "2", "3"]


def test_pets_are_what_torchvision_reads(roots):
    root = roots["oxford_pets"]
    split = split_of("oxford_pets", root)
    for source, part in ((split.train, "trainval"), (split.val, "test")):
        theirs = datasets.OxfordIIITPet(root, part)
        assert pairs(source) == expected(theirs)
        assert [name.replace("_", " ").title() for name in source.classes] == theirs.classes
    assert split.train.classes == ["Abyssinian", "american_bulldog", "Egyptian_Mau"]
    assert {split.train.image(i).mode for i in range(3)} == {"L", "CMYK", "RGBA"}


@pytest.mark.parametrize("protocol", [None, 0, 2, 4, 5])
def test_cifar_pickled_by_any_python(protocol, roots, tmp_path):
    make_cifar(tmp_path, protocol=protocol)
    split = split_of("cifar10", tmp_path)
    assert pairs(split.train) == pairs(split_of("cifar10", roots["cifar10"]).train)


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_or_the_one_around_it(name, roots, monkeypatch):
    root = roots[name]
    around, itself = split_of(name, root), split_of(name, root / CATALOGUE[name].folder)
    assert around.fingerprint == itself.fingerprint
    assert around.root == root  # what a resumed run is given
    monkeypatch.setenv(DATA_VARIABLE, str(root))
    assert split_of(name, None).fingerprint == around.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_a_fraction_is_held_out_of_the_training_part(name, roots):
    whole, split = split_of(name, roots[name]), split_of(name, roots[name], val_fraction=0.34)
    held = [split.val.targets[i] for i in split.val_indices]
    assert set(held) == {0, 1, 2}
    assert sorted([*split.train_indices, *split.val_indices]) == list(range(len(whole.train)))
    assert [split.train.key(i) for i in range(len(split.train))] == [
        whole.train.key(i) for i in range(len(whole.train))
    ]


@pytest.mark.parametrize("name", NAMES)
def test_some_classes(name, roots):
    whole, part = split_of(name, roots[name]), split_of(name, roots[name], class_range=(1, 3))
    assert part.train.classes == whole.train.classes[1:]
    for ours, theirs in ((part.train, whole.train), (part.val, whole.val)):
        assert pairs(ours) == [(x, label - 1) for x, label in pairs(theirs) if label]


def test_the_fingerprint_tells_the_parts_apart(roots):
    seen = {split_of(name, roots[name]).fingerprint for name in NAMES}
    swapped = split_of("cifar10", roots["cifar10"], train_split="test", val_split="train")
    seen |= {swapped.fingerprint}
    assert len(seen) == 5
    both = split_of("cifar10", roots["cifar10"], train_split="train+test", val_fraction=0.1)
    keys = {both.train.key(i) for i in range(len(both.train))}
    assert len(keys) == 36 and {"train/0", "train/29", "test/5"} <= keys


def test_names_of_flowers_from_a_file_beside_them(tmp_path):
    folder = make_flowers(tmp_path)
    names = folder / "cat_to_name.json"
    names.write_text('{"2": "rose", "1": "lotus", "3": "tulip"}')
    assert split_of("flowers102", tmp_path).train.classes == ["lotus", "rose", "tulip"]
    for text, line in (
        ('{"1": "rose"}', r"cannot read .*cat_to_name\.json as names of the classes 1 to 3: '2'"),
        ('{"1": "a", "2": "a", "3": "b"}', "must give each of 1 to 3 a name of its own"),
        ("[", "cannot read .*as names of the classes"),
    ):
        names.write_text(text)
        with pytest.raises(UserError, match=line) as caught:
            split_of("flowers102", tmp_path)
        assert "\n" not in str(caught.value)


def test_workers_see_the_images_in_memory(roots):
    model = ModelConfig(model="metala_nano", img_size=32, model_kwargs={"depth": 1})
    images = {}
    for workers in (0, 2):
        data = DataConfig(
            dataset="cifar10", data_dir=roots["cifar10"], batch_size=6, workers=workers,
            mean=(0.0,), std=(1.0,), crop_pct=1.0,
        )  # fmt: skip
        split = find_split(data)
        made = create_loaders(data, model, create_model(model, 3), split, 0)
        images[workers] = next(iter(made.val))[0]
        made.close()
    assert torch.equal(images[0], images[2])
    pixels = torch.from_numpy(split.val.pixels) / 255
    assert torch.allclose(images[0], pixels, atol=1e-6)


WRONG_BATCHES = [
    ({"data": None}, "data must be uint8 .images, 3072., it is NoneType"),
    ({"data": np.zeros((6, 3072), np.float32)}, r"it is float32 \[6, 3072\]"),
    ({"data": np.zeros((6, 1024), np.uint8)}, r"it is uint8 \[6, 1024\]"),
    ({"data": np.zeros(3072, np.uint8)}, r"it is uint8 \[3072\]"),
    ({"labels": [0] * 5}, "has 6 images and 5 labels"),
    ({"labels": None}, "has 6 images and no labels"),
    ({"labels": [0, 1, 2, 3, 0, 1]}, "has label 3; 0 to 2 are accepted"),
    ({"labels": [0, 1, 2, "x", 0, 1]}, "has label 'x'; 0 to 2 are accepted"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG_BATCHES, ids=[x for _, x in WRONG_BATCHES])
def test_a_batch_of_another_shape(changes, line, tmp_path):
    path = make_cifar(tmp_path) / "data_batch_4"
    right = {"data": np.zeros((6, 3072), np.uint8), "labels": [0] * 6}
    dump(path, {**right, **changes}, 4)
    with pytest.raises(UserError, match=rf"data_batch_4.* {line}"):
        split_of("cifar10", tmp_path)


def test_cifar_without_names(tmp_path):
    dump(make_cifar(tmp_path, hundred=True) / "meta", {"label_names": ["a"]})
    with pytest.raises(UserError, match="meta lacks fine_label_names"):
        split_of("cifar100", tmp_path)


MISSING = [
    ("cifar10", "data_batch_3"), ("cifar10", "test_batch"), ("cifar10", "batches.meta"),
    ("cifar100", "train"), ("cifar100", "meta"), ("flowers102", "imagelabels.mat"),
    ("flowers102", "setid.mat"), ("flowers102", "jpg"), ("flowers102", "jpg/image_00001.jpg"),
    ("oxford_pets", "images"), ("oxford_pets", "annotations/test.txt"),
    ("oxford_pets", "images/Abyssinian_1.jpg"),
]  # fmt: skip


@pytest.mark.parametrize(("root", "file"), MISSING, indirect=["root"], ids=[x for _, x in MISSING])
def test_a_missing_file_is_named_with_the_layout_and_its_home(root, file, request):
    name = request.node.callspec.params["root"]
    of = CATALOGUE[name]
    path = root / of.folder / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    parts = {"train_split": "train+val+test", "val_fraction": 0.2} if name == "flowers102" else {}
    with pytest.raises(UserError) as caught:
        split_of(name, root, **parts)
    line = str(caught.value)
    assert line.startswith(f"{root / of.folder} has no {file}, it holds ") and "\n" not in line
    assert line.endswith(
        f"is a folder such as {of.folder}/ with {of.layout}, published at {of.page}"
    )


def test_an_empty_folder_and_several_missing_images(tmp_path):
    with pytest.raises(
        UserError, match=r"has no batches\.meta, it holds nothing; CIFAR-10 is a folder "
    ):
        split_of("cifar10", tmp_path)
    folder = make_pets(tmp_path)
    for i in (2, 3):
        (folder / "images" / f"Abyssinian_{i}.jpg").unlink()
    with pytest.raises(UserError, match=r"Abyssinian_2\.jpg \(2 of 12 images are missing\), it"):
        split_of("oxford_pets", tmp_path)
    shutil.rmtree(folder / "images")
    (folder / "images").touch()
    with pytest.raises(UserError, match=r"cannot read .*: Not a directory"):
        split_of("oxford_pets", tmp_path)


WRONG_FLOWERS = [
    ("imagelabels", {"labels": [[1, 2, 4] * 9]}, "labels must be the numbers from 1 on"),
    ("imagelabels", {"labels": [[0, 1, 2] * 9]}, "labels must be the numbers from 1 on"),
    ("imagelabels", {"labels": [[1.5, 1, 2] * 9]}, "labels must be a row of whole numbers"),
    ("imagelabels", {"labels": [[np.inf, 1, 2] * 9]}, "labels must be a row of whole numbers"),
    ("imagelabels", {"labels": [[1, 2], [3, 1]]}, "labels must be a row of whole numbers"),
    ("imagelabels", {"label": [[1]]}, "has no variable labels"),
    ("imagelabels", {"labels": [[1, 2, 3]]}, "names image .*imagelabels.mat has 3 labels"),
    ("setid", {"trnid": [[0, 1]], "valid": [[2]]}, "setid.mat names image 0,"),
    ("setid", {"trnid": [[1, 2]], "valid": [[28]]}, "setid.mat names image 28,"),
    ("setid", {"trnid": [[]], "valid": [[2]]}, "no images in train of"),
    ("setid", {"trnid": [[1]]}, "has no variable valid"),
    ("setid", b"MATLAB 5.0", "cannot read .*setid.mat"),
    ("setid", b"", "cannot read .*setid.mat"),
]


@pytest.mark.parametrize(("file", "values", "line"), WRONG_FLOWERS)
def test_wrong_lists_of_flowers(file, values, line, tmp_path):
    path = make_flowers(tmp_path) / f"{file}.mat"
    if isinstance(values, bytes):
        path.write_bytes(values)
    else:
        savemat(path, {key: np.array(value) for key, value in values.items()})
    with pytest.raises(UserError, match=line) as caught:
        split_of("flowers102", tmp_path)
    assert "\n" not in str(caught.value)


WRONG_PETS = [
    ("trainval", "Abyssinian 1 1 1", r"trainval\.txt, line 1: 'Abyssinian 1 1 1' is no NAME_123"),
    ("trainval", "../x_1 1 1 1", "is no NAME_123 CLASS"),
    ("trainval", "A_1 0 1 1", "is no NAME_123 CLASS"),
    ("trainval", "A_1 one 1 1", "is no NAME_123 CLASS"),
    ("trainval", "A_1 1 1 1\nB_1 1 1 1", "line 2: class 1 is 'B', before it was 'A'"),
    ("trainval", "A_1 1 1 1\nB_1 3 1 1", "of the classes 1 to 3 some have no image"),
    ("trainval", "A_1 1 1 1\nA_2 2 1 1", "two classes have the same name"),
    ("trainval", "Abyssinian_1 1 1 1", "has one class, 'Abyssinian'"),
    ("trainval", "# none\n\n", "no images in trainval of"),
    ("test", "New_1 4 1 1", r"test\.txt has class 'New', which the training images lack"),
    ("test", "New_1 2 1 1", "class 2 is 'New', before it was 'american_bulldog'"),
    ("test", b"\xff\xfe", r"cannot read .*test\.txt: .*utf-8"),
]


@pytest.mark.parametrize(("part", "text", "line"), WRONG_PETS)
def test_wrong_lists_of_pets(part, text, line, tmp_path):
    path = make_pets(tmp_path) / "annotations" / f"{part}.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=line) as caught:
        split_of("oxford_pets", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_class_without_test_images_and_windows_line_ends(tmp_path):
    path = make_pets(tmp_path) / "annotations" / "test.txt"
    lines = [x for x in path.read_text().splitlines() if "Abyssinian" not in x]
    path.write_bytes("\r\n".join(["# list", *lines, ""]).encode())
    split = split_of("oxford_pets", tmp_path)
    assert set(split.val.targets) == {1, 2} and split.val.classes == split.train.classes


WRONG_PARTS = [
    ("cifar10", {"train_split": "training"}, "'training': CIFAR-10 has the parts train, test; "),
    ("cifar10", {"val_split": "val"}, r"data\.val_split='val': CIFAR-10 has the parts"),
    ("cifar10", {"train_split": "train+train"}, "several are written as train.test"),
    ("cifar10", {"train_split": "test"}, "leaves none of the parts test to hold out"),
    ("cifar10", {"val_split": "train"}, "train_split=train and val_split=train share train"),
    ("flowers102", {"train_split": "trainval", "val_split": "val"}, "share val"),
    ("oxford_pets", {"train_split": "train", "val_split": "trainval"}, "share trainval"),
    ("cifar10", {"val_split": "test", "val_fraction": 0.1}, "val_fraction=0.1 holds out of the"),
    ("cifar100", {"input_key": "x"}, "input_key is for dataset wds and hfds, not cifar100"),
    ("cifar10", {"val_file": "x"}, "val_file is for dataset folder, .*, not cifar10"),
    ("flowers102", {"class_range": (0, 4)}, "there are 3 classes"),
]


@pytest.mark.parametrize(("name", "flags", "line"), WRONG_PARTS)
def test_settings_that_do_not_fit(name, flags, line, roots):
    with pytest.raises(UserError, match=line) as caught:
        split_of(name, roots[name], **flags)
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    path = make_pets(tmp_path) / "images" / "Abyssinian_1.jpg"
    path.write_bytes(b"no picture")
    source = split_of("oxford_pets", tmp_path).train
    with pytest.raises(UnreadableImage, match=r"cannot read image .*Abyssinian_1\.jpg"):
        source.image(0)
    Image.new("P", (8, 8)).save(path, format="GIF")  # as some of that set are, whatever their name
    assert convert(source.image(0), "RGB").size == (8, 8)


@pytest.mark.launch
@pytest.mark.parametrize("name", NAMES)
def test_its_configuration_trains_and_leaves_a_checkpoint(name, roots, tmp_path, capsys):
    status = main([
        "train", "--config", f"finetune/{name}", "--data-dir", str(roots[name]), "--batch-size",
        "4", "--max-steps", "2", "--workers", "0", "--run-dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert status == 0, capsys.readouterr().err
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)
    side = 32 if name.startswith("cifar") else 128
    assert model(torch.zeros(1, 3, side, side)).shape == (1, 3)
    assert list(model.pretrained_cfg["label_names"]) == split_of(name, roots[name]).train.classes
    if name == "cifar10":  # what published weights say they were trained on
        flags = ["--out", str(tmp_path / "out"), "--license", "apache-2.0"]
        assert main(["weights", "publish", str(tmp_path / "run"), *flags]) == 0
        assert "| trained on | cifar10 |" in (tmp_path / "out" / "README.md").read_text()

"""`predict`: the same as the model by hand, whatever the files are."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.models import save_for_hf

from metala_vision.cli import main
from metala_vision.evaluate import evaluation_transform
from metala_vision.labels import brief, labels_of
from metala_vision.predict import pictures
from metala_vision.predict.images import find_images, read_image

ROOT = Path(__file__).parents[2]
ORIENTATION = 0x0112  # of EXIF


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two photographs, in folders, with what is no image beside them."""
    folder = tmp_path_factory.mktemp("photos")
    for place, name in (("b/flower.png", "flower.jpg"), ("a/china.PNG", "china.jpg")):
        (folder / place).parent.mkdir()
        Image.fromarray(load_sample_image(name)).resize((90, 70)).save(folder / place)
    (folder / "notes.txt").write_text("no image")
    for hidden in (".cache/x.png", "a/._china.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A transformer of timm's own, with names for its classes."""
    folder = tmp_path_factory.mktemp("run") / "last"
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=4)
    model.head.weight.data *= 100  # else every class is as likely
    labels = {"label_names": ["n01443537", "b", "c", "d"], "label_descriptions": {"b": "bee, apis"}}
    save_for_hf(model, folder, model_config=labels, safe_serialization=True)
    return folder


def predicted(tmp_path, *flags, status=0):
    """The JSON of a command with that exit status."""
    out = tmp_path / "out.json"
    assert main(["predict", *map(str, flags), "--json", str(out)]) == status
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", ["shipped", "folder"])
def test_it_is_the_softmax_of_the_model(photos, checkpoint, tmp_path, capsys, kind):
    name = "metala_nano" if kind == "shipped" else f"local-dir:{checkpoint}"
    flags = [] if kind == "shipped" else ["--model", checkpoint]
    told = predicted(tmp_path, photos, *flags, "--csv", tmp_path / "out.csv", "--batch-size", 1)
    model = timm.create_model(name, pretrained=True).eval()
    _, transform = evaluation_transform(model.pretrained_cfg)
    files = [photos / "a/china.PNG", photos / "b/flower.png"]
    assert [own["image"] for own in told["images"]] == [str(path) for path in files]
    out = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    topk = min(5, model.num_classes)
    assert len(rows) == 2 * topk and len(out) == 2 * (topk + 1) + 1
    for i, path in enumerate(files):
        with torch.no_grad():
            logits = model(transform(Image.open(path).convert("RGB"))[None])[0].double()
        share = (logits - logits.max()).exp() / (logits - logits.max()).exp().sum()
        order = share.argsort(descending=True)[:topk].tolist()
        own = told["images"][i]["predictions"]
        assert [guess["label"] for guess in own] == order
        # float32 over a few blocks
        np.testing.assert_allclose([x["probability"] for x in own], share[order], rtol=1e-4)
        names = model.pretrained_cfg["label_names"]
        assert [guess["name"] for guess in own] == [names[k] for k in order]
        best = rows[i * topk]
        assert (best["image"], best["rank"], best["name"]) == (str(path), "1", names[order[0]])
        assert float(best["probability"]) == pytest.approx(own[0]["probability"], abs=1e-6)
        line = out[i * (topk + 1) + 1]
        assert line.startswith(f"  {100 * share[order[0]]:6.2f} %  {names[order[0]]}")
        described = {guess["name"]: guess["description"] for guess in own}
        if kind == "folder":
            goldfish = "goldfish, Carassius auratus"  # WordNet's
            assert described == {"n01443537": goldfish, "b": "bee, apis", "c": None, "d": None}
        else:
            assert line.endswith(model.pretrained_cfg["label_descriptions"][names[order[0]]])
    assert out[-1] == f"{flags[1] if flags else 'metala_nano'}: 2 images"


def test_topk(photos, tmp_path):
    for asked, there in ((2, 2), (1000, 200)):
        told = predicted(tmp_path, photos / "b", "--topk", asked)
        own = [guess["probability"] for guess in told["images"][0]["predictions"]]
        assert len(own) == there and own == sorted(own, reverse=True)
    assert sum(own) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(tmp_path, turn):
    """The eight orientations of EXIF: what is stored, and how it is shown."""
    upright = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[turn]  # fmt: skip
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    for name in ("x.png", "x.webp"):
        kind = {"lossless": True} if name.endswith("webp") else {}
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, **kind)
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name, "RGB")), upright)


def test_a_turned_photograph_gets_the_same_answer(photos, tmp_path):
    image = Image.open(photos / "b/flower.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned, untold = tmp_path / "turned.png", tmp_path / "untold.png"
    image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    image.transpose(Image.Transpose.ROTATE_90).save(untold)
    told = predicted(tmp_path, photos / "b/flower.png", turned, untold)["images"]
    assert told[0]["predictions"] == told[1]["predictions"] != told[2]["predictions"]


def test_grey_transparent_and_16_bit_images(photos, tmp_path):
    """Each means the same grey picture."""
    image = Image.open(photos / "b/flower.png")
    grey = image.convert("L")
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    grey.convert("RGBA").save(tmp_path / "rgba.png")
    grey.convert("LA").save(tmp_path / "la.png")
    grey.quantize(256).save(tmp_path / "palette.gif")
    shown = {p.name: np.asarray(read_image(p, "RGB"), int) for p in find_images([str(tmp_path)])}
    assert set(shown) == {"grey.png", "sixteen.png", "rgba.png", "la.png"}
    for name, own in shown.items():
        assert (own == np.asarray(grey)[..., None]).all(), name
    palette = np.asarray(read_image(tmp_path / "palette.gif", "RGB"), int)
    assert abs(palette - np.asarray(grey)[..., None]).max() <= 16  # fewer shades
    assert read_image(photos / "b/flower.png", "L").mode == "L"


def test_unreadable_images_are_named_and_the_others_done(photos, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes((photos / "b/flower.png").read_bytes()[:2000])
    note = photos / "notes.txt"
    told = predicted(tmp_path, note, photos / "b", bad, "--batch-size", 2, status=1)
    assert [own["image"] for own in told["images"]] == [str(photos / "b/flower.png")]
    assert [own["image"] for own in told["unreadable"]] == [str(note), str(bad)]
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 2 and "Traceback" not in captured.err
    for line, path in zip(lines, (note, bad), strict=True):
        assert line.startswith(f"cannot read image {path}: ")
    assert captured.out.splitlines()[-1] == "metala_nano: 1 images, 2 cannot be read"
    assert main(["predict", str(bad), "--csv", str(tmp_path / "none.csv")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == "metala-vision: error: none of the images can be read: 1 of 1"
    assert not (tmp_path / "none.csv").exists()


def test_a_folder_is_read_in_order_without_what_is_hidden_and_links_end(photos, tmp_path):
    for name in ("z.jpg", "A.jpeg", "k/1.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "k" / "again").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(photos)
    own = [str(path.relative_to(tmp_path)) for path in find_images([str(tmp_path)])]
    assert own == ["A.jpeg", "k/1.webp", "linked/a/china.PNG", "linked/b/flower.png", "z.jpg"]


def test_any_file_name_can_be_told(photos, tmp_path, capsys):
    """Bytes that are no UTF-8, a line break, and what matplotlib takes for mathematics."""
    names = [os.fsdecode(b"\xff.png"), "a\nb.png", "$x^{.png"]
    for name in names:
        (tmp_path / name).write_bytes((photos / "b/flower.png").read_bytes())
    picture, table = tmp_path / "p.PNG", tmp_path / "t.csv"
    files = [str(tmp_path / name) for name in names]
    flags = ["--picture", str(picture), "--csv", str(table)]
    told = predicted(tmp_path, *files, *flags)
    assert [own["image"] for own in told["images"]] == files
    out = capsys.readouterr().out
    assert all(f"{tmp_path}/{name}\n" in out for name in ("?.png", "a?b.png", "$x^{.png"))
    assert len(list(csv.DictReader(table.read_text().splitlines()))) == 15
    with Image.open(picture) as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24)) > 1000


def test_a_picture_of_many_says_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "MOST", 5)
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(7):
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(folder / f"{i:03d}.png")
    picture = tmp_path / "p.png"
    assert main(["predict", str(folder), "--picture", str(picture), "--topk", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"{picture} shows 5 of 7 images, evenly spread"


def test_names_of_classes():
    model = timm.create_model("test_vit")
    names, words = labels_of(model, "test_vit")  # 1000 classes: ImageNet-1k's, as timm has it
    assert (names[0], words[names[0]]) == ("n01440764", "tench, Tinca tinca")
    assert labels_of(model, "runs/x/last") == ([str(i) for i in range(1000)], {})
    other = timm.create_model("test_vit", num_classes=7)
    assert labels_of(other, "test_vit")[0] == list("0123456")
    assert brief("lion, king of beasts, Panthera leo", 20) == "lion"
    assert brief("x" * 30, 20) == "x" * 19 + "…"


@pytest.mark.launch
def test_without_a_network(photos):
    """With shipped weights; any connection would end the process with a traceback."""
    code = (
        "import socket, sys\n"
        "def refuse(*arguments, **named): raise AssertionError('the network was used')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from metala_vision.cli import main\n"
        "sys.exit(main(['predict', *sys.argv[1:]]))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(photos / "b"), "--topk", "1"], env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[0] == str(photos / "b/flower.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: IMAGE"),
        (["no.png"], "image no.png does not exist"),
        (["metala_nano", "x.png"], "image metala_nano does not exist; a model is named by --model"),
        (["https://a.org/x.png"], "https://a.org/x.png is an address; files and folders of images"),
        (["{empty}"], "no images in folder {empty}; endings read: .jpg .jpeg .png"),
        (["{checkpoint}"], "a model is named by --model"),
        (["{photos}", "--topk", "0"], "--topk and --batch-size need 1 or more"),
        (["{photos}", "--batch-size", "0"], "--topk and --batch-size need 1 or more"),
        (["{photos}", "--picture", "x.gif"], "--picture must end in one of .png .pdf .svg, got x."),
        (["{photos}", "--json", "no/x.json"], "cannot write no/x.json: No such file or directory"),
        (["{photos}", "--json", "x", "--csv", "x"], "--csv x is --json too"),
        (["{photos}", "--picture", "{photos}/b/flower.png"], "b/flower.png is an image that is re"),
        (["{photos}", "--model", "metala_nan"], "no timm model; did you mean metala_nano?"),
        (["{photos}", "--model", "lru_nano"], "no weights for lru_nano in this package"),
        (["{photos}", "--model", "{headless}"], "has no classifier: it names no class"),
        (["{photos}", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        pytest.param(
            ["{photos}", "--device", "cuda"], "--device cuda: torch finds no GPU; auto and cpu are",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line(flags, message, photos, checkpoint, tmp_path, monkeypatch, capsys):
    places = {name: tmp_path / name for name in ("empty", "work", "headless")}
    for place in places.values():
        place.mkdir()
    monkeypatch.chdir(places["work"])
    places |= {"photos": photos, "checkpoint": checkpoint}
    if "{headless}" in flags:
        model = timm.create_model("metala_nano", depth=1, num_classes=0)
        options = {"depth": 1, "num_classes": 0}
        save_for_hf(model, places["headless"], model_args=options, safe_serialization=True)
    assert main(["predict", *(flag.format(**places) for flag in flags)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message.format(**places) in lines[0], lines
    assert not list(places["work"].iterdir())  # nothing is left behind

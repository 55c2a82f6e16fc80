"""Pictures from the command line."""

import json
import math

import numpy as np
import pytest
import timm
from PIL import Image
from timm.models import save_for_hf

from metala_vision.cli import main

SMALL = ["--untrained", "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder: a colour image of another shape than any model's, and the same in other modes."""
    folder = tmp_path_factory.mktemp("images")
    rows, columns = np.mgrid[:70, :110]
    waves = [np.sin(rows / 9) + np.cos(columns / 7 + i) for i in range(3)]
    image = Image.fromarray((np.stack(waves, 2) * 60 + 127).astype(np.uint8))
    image.save(folder / "colour.png")
    image.convert("L").resize((20, 30)).save(folder / "grey.png")
    image.convert("RGBA").save(folder / "rgba.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "last"
    options = {"embed_dim": 32, "depth": 3, "num_heads": 1, "num_classes": 5}
    model = timm.create_model("attention_nano", **options)
    save_for_hf(model, folder, model_args=options, safe_serialization=True)
    return folder


def drawn(picture, least=300):
    """That it is a picture with something on it."""
    with Image.open(picture) as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 24)) > least
        return image.size


def test_every_scan_order_is_drawn(tmp_path, capsys):
    picture = tmp_path / "scans.png"
    assert main(["visualize", "scans", "--grid", "3", "5", "--out", str(picture)]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    drawn(picture, 50)


def run(tmp_path, *flags):
    """The picture's path and the numbers of a command that succeeds."""
    out, numbers = tmp_path / "picture.png", tmp_path / "numbers.json"
    given = [str(flag) for flag in flags]
    assert main(["visualize", *given, "--out", str(out), "--json", str(numbers)]) == 0
    return out, json.loads(numbers.read_text())


@pytest.mark.parametrize("name", ["colour", "grey", "rgba"])
def test_attention_beside_a_checkpoint(images, checkpoint, tmp_path, capsys, name):
    picture, numbers = run(
        tmp_path, "attention", "metala_nano", *SMALL, "--image", images / f"{name}.png",
        "--token", 2, 6, "--compare-to", checkpoint,
    )  # fmt: skip
    drawn(picture)
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == str(picture) and told[0].startswith("metala_nano: token 2 6 of 8 x 8; map ")
    ours, theirs = numbers["models"]
    assert (ours["untrained"], theirs["untrained"]) == (True, False)
    assert ours["token"] == theirs["token"] == [2, 6]
    assert [own["layer"] for own in theirs["layers"]] == [0, 2]  # as many as ours
    for layer in ours["layers"]:
        assert layer["error"] < 1e-4  # the largest, float32; the mean is below 1e-5
        maps = {key: np.array(value) for key, value in layer["maps"].items()}
        assert {key: value.shape for key, value in maps.items()} == dict.fromkeys(
            ("forward", "backward", "sum"), (2, 8, 8)
        )
        np.testing.assert_allclose(maps["sum"], maps["forward"] + maps["backward"], rtol=1e-12)
        # In raster order, token (2, 6) hears of (2, 5) forward and of (2, 7) backward.
        assert (maps["forward"][:, 2, 7] == 0).all() and (maps["forward"][:, 2, 5] != 0).all()
        assert (maps["backward"][:, 2, 5] == 0).all() and (maps["backward"][:, 2, 7] != 0).all()
        shown = np.array(layer["relative"]["sum"])
        size = np.abs(maps["sum"])
        expected = (size / size.mean((1, 2), keepdims=True)).mean(0)
        np.testing.assert_allclose(shown, expected, rtol=1e-12)
    softmax = np.array(theirs["layers"][0]["maps"]["all tokens"])
    assert softmax.sum() == pytest.approx(1, abs=1e-9)


def test_attention_by_head_of_another_grid(images, tmp_path, capsys):
    picture, numbers = run(
        tmp_path, "attention", "retnet_nano", *SMALL, "scans=[hilbert,column]", "split_heads=true",
        "--image", images / "colour.png", "--heads", "each", "--layers", 1, 0, "--compare-to",
        "deit_tiny_patch16_224", "--token", 0, 7,
    )  # fmt: skip
    width, height = drawn(picture)
    assert height > width  # a column for each of two layers, six rows of ours and three of DeiT's
    ours, theirs = numbers["models"]
    assert [own["layer"] for own in ours["layers"]] == [1, 0] and len(theirs["layers"]) == 2
    assert (
        theirs["grid"] == [14, 14] and theirs["token"] == [0, 13] and theirs["prefix_tokens"] == 1
    )
    assert np.shape(theirs["layers"][0]["prefix"]["all tokens"]) == (3, 1)
    assert "tokens that are no patches (1) left out" in capsys.readouterr().out


def test_receptive_field(images, tmp_path, capsys):
    picture, numbers = run(tmp_path, "receptive-field", "gla_nano", *SMALL, "--image", images)
    drawn(picture)
    told = capsys.readouterr().out
    assert "; 3 images" in told and numbers["images"] == "3 images"
    assert numbers["token"] == [4, 4] and np.shape(numbers["field"]) == (64, 64)
    assert numbers["shares"][-1] == pytest.approx(1, abs=1e-12) and numbers["sides"][-1] == 72
    side = numbers["side_that_holds"]["0.5"]
    assert f"50 % within {side} px" in told
    field = np.array(numbers["field"])
    half = field[36 - side // 2 : 36 + side // 2, 36 - side // 2 : 36 + side // 2]
    assert half.sum() >= 0.5 * field.sum() > half[1:-1, 1:-1].sum()


def test_noise_is_said_and_repeats(tmp_path):
    flags = ["receptive-field", "metala_nano", *SMALL, "--max-images", 2, "--token", 0, 0]
    _, first = run(tmp_path, *flags)
    _, again = run(tmp_path, *flags)
    assert first == again and first["images"] == "2 images of standard normal noise, seed 0"


def test_memory(images, tmp_path, capsys):
    picture, numbers = run(
        tmp_path, "memory", "retnet_nano", *SMALL, "--image", images, "--max-images", 2
    )
    drawn(picture, 100)
    told = capsys.readouterr().out.splitlines()
    assert numbers["images"] == "2 of 3 images, evenly spread" and len(told) == 4
    expected = [math.log(2) / -math.log1p(-(2.0 ** (-5 - h))) for h in range(2)]
    for layer in numbers["layers"]:
        # As in test_memory.py
        assert layer["half_life_by_head"] == pytest.approx(expected, rel=1e-5)
    assert told[1].split()[:4] == ["layer", "0", "both", "directions"]


def test_memory_without_end_is_null_and_is_drawn(tmp_path):
    """log alpha = logsigmoid(a) / tau."""
    flags = [
        "memory",
        "metala_nano",
        *SMALL,
        "shared_decay=false",
        "tau=1.0e+46",
        "--max-images",
        1,
    ]
    picture, numbers = run(tmp_path, *flags)
    drawn(picture, 50)
    assert len(numbers["layers"]) == 4 and numbers["layers"][0]["half_life"] == [None] * 3


PHOTO = ["--image", "{images}/colour.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["scans", "--grid", "0", "5"], "--grid takes 1 to 256 rows and columns, got [0, 5]"),
        (["scans", "--grid", "a", "5"], "invalid int value: 'a'"),
        (["scans", "--out", "x.xyz"], "--out must end in one of .png .pdf .svg, got x.xyz"),
        (["scans", "--out", "noext"], "--out must end in one of .png .pdf .svg, got noext"),
        (["attentions"], "invalid choice: 'attentions'"),
        ([], "the following arguments are required: WHAT"),
        (["scans", "--out", "/sys/kernel/x.png"], "cannot write /sys/kernel/x.png: "),
        (["memory", "x", "--out", "no/such/x.png"], "cannot write no/such/x.png: No such file"),
        (["memory", "x", "--json", "no/such/x"], "cannot write no/such/x: No such file"),
        (["memory", "x", "--json", "/sys"], "cannot write /sys: Is a directory"),
        (["memory", "metala_nan"], "no timm model; did you mean metala_nano?"),
        (["memory", "lru_nano"], "no weights for lru_nano in this package; METALA_VISION_WEIGHTS"),
        (["memory", "{images}"], "is no checkpoint: it holds colour.png, grey.png, rgba.png, but"),
        (["memory", "{checkpoint}", "--untrained"], "--untrained takes a timm name, got"),
        (["memory", "{checkpoint}"], "has no decay, and so no half-life; accepted: models of Me"),
        (["memory", "metala_nano", "--max-images", "0"], "--max-images needs 1 or more, got 0"),
        (["memory", "metala_nano", "--image", "no.png"], "image no.png does not exist"),
        (["memory", "metala_nano", *SMALL, "img_size=32"], "--model-kwargs takes no img_size"),
        (["memory", "metala_nano", *SMALL, "depth"], "--model-kwargs takes key=value, got 'depth'"),
        (["attention", "metala_nano"], "the following arguments are required: --image"),
        (["attention", "metala_nano", "--image", "{images}"], "takes one image, "),
        (["attention", "metala_nano", "--image", "no.png"], "image no.png does not exist"),
        (["attention", "metala_nano", *SMALL, "--image", "{checkpoint}/config.json"],
         "cannot read image "),
        (["attention", "mamba_nano", *SMALL, *PHOTO], "mamba_nano has no attention map per head: "),
        (["attention", "metala_nano", *SMALL, *PHOTO, "--layers", "0", "2"],
         "--layers takes 0 to 1, or all, for metala_nano; got 2"),
        (["attention", "metala_nano", *SMALL, *PHOTO, "--layers", "-1"],
         "--layers takes 0 to 1, or all, for metala_nano; got -1"),
        (["attention", "metala_nano", *SMALL, *PHOTO, "--token", "8", "0"],
         "--token 8 0 is not on the grid of 8 x 8 tokens; accepted: row 0 to 7, column 0 to 7"),
        (["attention", "metala_nano", *SMALL, *PHOTO, "--token", "0", "-1"], "--token 0 -1 is not"),
        (["attention", "metala_nano", *SMALL, *PHOTO, "--compare-to", "resnet10t"],
         "resnet10t has no attention map per head"),
        (["receptive-field", "metala_nano", *SMALL, "--token", "0", "9"], "--token 0 9 is not on"),
        (["receptive-field", "metala_nano", "--image", "{checkpoint}"], "no images in folder "),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_is_one_line(flags, message, images, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    named = [flag.format(images=images, checkpoint=checkpoint) for flag in flags]
    assert main(["visualize", *named]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not list(tmp_path.iterdir())  # nothing is left behind

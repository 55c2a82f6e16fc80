"""`eval`: the same figures as training's evaluation, by hand, and for other kinds of folders."""

import csv
import json
import shutil

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from metala_vision.cli import main
from metala_vision.errors import UserError
from metala_vision.evaluate import calibration_error, evaluate_checkpoint
from tests.conftest import SMALL_MODEL


@pytest.fixture(scope="module")
def checkpoint(digit_tree, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "run"
    flags = ["--data-dir", str(digit_tree), "--run-dir", str(run_dir), *SMALL_MODEL, "--workers",
             "0", "--batch-size", "12", "--epochs", "25", "--lr", "3e-3", "--hflip",
             "0"]  # fmt: skip
    assert main(["train", *flags]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_dir / "last"


def test_the_model_of_these_tests_has_learned(checkpoint):
    """Else every image would get the same class, and the tests below see little."""
    assert last_evaluation(checkpoint)["top1"] > 50


def last_evaluation(checkpoint):
    lines = (checkpoint.parent / "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if x["event"] == "eval"][-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_the_evaluation_of_training(checkpoint, digit_tree, workers, tmp_path, capsys):
    out = tmp_path / "report.json"
    flags = ["--data-dir", str(digit_tree), "--batch-size", "5", "--workers", str(workers)]
    assert main(["eval", str(checkpoint), *flags, "--json", str(out)]) == 0
    report, told = json.loads(out.read_text()), last_evaluation(checkpoint)
    for key in ("top1", "top5", "images", "unreadable"):
        assert report[key] == told[key]
    assert report["loss"] == pytest.approx(told["loss"], rel=1e-6) and report["img_per_s"] > 0
    assert capsys.readouterr().out.splitlines()[-1] == f"top-1 {told['top1']:.2f} % on 12 images"


def test_accuracy_by_class_adds_up(checkpoint, digit_tree, tmp_path):
    path = tmp_path / "classes.csv"
    report = evaluate_checkpoint(str(checkpoint), digit_tree, workers=0, per_class=path)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["class"] for row in rows] == ["digit0", "digit1", "digit2"]
    assert sum(int(row["images"]) for row in rows) == report.images == 12
    mean = sum(float(row["top1"]) * int(row["images"]) for row in rows) / 12
    assert mean == pytest.approx(report.top1, abs=0.01)


def test_folders_of_label_numbers_as_in_imagenet_v2(checkpoint, digit_tree, tmp_path):
    """Names sort as 0, 1, 10, ...: a label is its name, not its place."""
    expected = evaluate_checkpoint(str(checkpoint), digit_tree, workers=0)
    AcceleratorState._reset_state(reset_partial_state=True)
    for label in range(3):
        shutil.copytree(digit_tree / "val" / f"digit{label}", tmp_path / "v2" / str(label))
    assert evaluate_checkpoint(str(checkpoint), tmp_path / "v2", workers=0).top1 == expected.top1


def test_images_of_other_classes_are_left_out(checkpoint, own_digit_tree, tmp_path, capsys):
    before = evaluate_checkpoint(str(checkpoint), own_digit_tree, workers=0)
    for name in ("aardvark", "zebra"):
        shutil.copytree(own_digit_tree / "val" / "digit0", own_digit_tree / "val" / name)
    with pytest.raises(UserError, match="has class 'aardvark', which the training images lack"):
        evaluate_checkpoint(str(checkpoint), own_digit_tree, workers=0)
    flags = ["eval", str(checkpoint), "--data-dir", str(own_digit_tree), "--workers", "0"]
    assert main([*flags, "--known-classes"]) == 0
    out = capsys.readouterr().out
    assert f"left out: 2 classes that {checkpoint} was not trained on" in out
    assert f"top-1 {before.top1:.2f} % on {before.images} images" in out
    nameless = tmp_path / "nameless"
    shutil.copytree(checkpoint, nameless)
    written = json.loads((nameless / "config.json").read_text())
    del written["label_names"]
    (nameless / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match="nameless does not name its classes"):
        evaluate_checkpoint(str(nameless), own_digit_tree, workers=0, known_classes=True)


def test_any_of_several_labels_is_right_and_images_without_one_are_left_out(
    checkpoint, digit_tree, tmp_path
):
    names = sorted(digit_tree.rglob("val/*/*.png"), key=lambda p: p.name)
    labels = [[0, 1, 2] for _ in names]
    labels[0] = []
    (tmp_path / "real.json").write_text(json.dumps(labels))
    report = evaluate_checkpoint(
        str(checkpoint), digit_tree, workers=0, labels=tmp_path / "real.json"
    )
    assert (report.top1, report.images) == (100.0, 11)
    AcceleratorState._reset_state(reset_partial_state=True)
    wrong = [[(int(p.parent.name[-1]) + 1) % 3] for p in names]
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    turned = evaluate_checkpoint(
        str(checkpoint), digit_tree, workers=0, labels=tmp_path / "wrong.json"
    )
    assert turned.top1 <= 100 - last_evaluation(checkpoint)["top1"] + 1e-9


def test_calibration_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.05, 0.5], dtype=torch.float64)
    right = torch.tensor([True, False, False, True])
    # bins: {0.95, 0.95}, {0.05}, {0.5}
    expected = (abs(1.9 - 1) + 0.05 + abs(0.5 - 1)) / 4
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration_error(torch.ones(5), torch.ones(5, dtype=torch.bool)) == 0


def test_an_unreadable_image_is_named_and_counted(checkpoint, own_digit_tree, capsys):
    bad = own_digit_tree / "val" / "digit1" / "13.png"
    bad.write_bytes(b"")
    report = evaluate_checkpoint(str(checkpoint), own_digit_tree, workers=0, max_unreadable=0.1)
    assert (report.images, report.unreadable) == (11, 1)
    assert capsys.readouterr().out.startswith(f"cannot read image {bad}: ")


MISTAKES = [
    (["metala_nanno"], "'metala_nanno' is no folder with a checkpoint and no timm model; did you"),
    (["EMPTY"], "EMPTY is no checkpoint: it holds nothing, but no config.json"),
    (["CHECKPOINT", "--data-dir", "nowhere"], "data folder nowhere does not exist"),
    (["CHECKPOINT", "--labels", "nowhere.json"], "cannot read labels nowhere.json: "),
    (["CHECKPOINT", "--batch-size", "0"], "--batch-size needs >= 1"),
    (["CHECKPOINT", "--per-class", "/nowhere/x.csv"], "cannot write /nowhere/x.csv: No such folde"),
    (["CHECKPOINT", "--json", "/nowhere/x.json"], "cannot write /nowhere/x.json: No such folder"),
    (["CHECKPOINT", "--labels", "EMPTIES"], "EMPTIES must be a JSON list with a list of label"),
    (["CHECKPOINT", "--model-kwargs", "in_chans=1"], "--model-kwargs takes no in_chans: images"),
    (["UNNAMED"], "UNNAMED does not name its 5 classes, and "),
    (["CHECKPOINT", "--data-dir", "OTHER"], "OTHER/val has class 'cat', which the training images"),
    (["lru_nano", "--model-kwargs", "num_classes=3"], "no weights for lru_nano in this package"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda x: str(x)[:30])
def test_a_mistake_is_one_line(flags, message, checkpoint, digit_tree, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "other" / "val" / "cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (tmp_path / "empties.json").write_text("[[], []]")
    unnamed = tmp_path / "unnamed"
    model = timm.create_model("metala_nano", depth=1, embed_dim=32, num_heads=1, num_classes=5)
    timm.models.save_for_hf(
        model, str(unnamed), safe_serialization=True,
        model_args={"depth": 1, "embed_dim": 32, "num_heads": 1},
    )  # fmt: skip
    places = {"CHECKPOINT": str(checkpoint), "EMPTY": str(tmp_path / "empty"),
              "OTHER": str(tmp_path / "other"), "UNNAMED": str(unnamed),
              "EMPTIES": str(tmp_path / "empties.json")}  # fmt: skip
    given = [places.get(flag, flag) for flag in flags]
    if "--data-dir" not in given:
        given += ["--data-dir", str(digit_tree)]
    assert main(["eval", *given, "--workers", "0"]) == 2
    for name, place in places.items():
        message = message.replace(name, place) if message.startswith(name) else message
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"metala-vision: error: {message}"), error

"""Several processes evaluate and train as one."""

import json
import shutil

import pytest
import timm
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import save_for_hf

import metala_vision  # noqa: F401  (registers the models)
from tests.train._runs import assert_same_run, finish, launch, metrics

IMAGES = 1003
pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = timm.create_model(
        "metala_nano", img_size=32, num_classes=10, embed_dim=32, depth=1, num_heads=1
    )
    save_for_hf(
        model, folder, safe_serialization=True,
        model_config={"label_names": [f"digit{i}" for i in range(10)]},
        model_args={"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 1},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Of the real digits; two that cannot be read, one of them the last."""
    root = tmp_path_factory.mktemp("images")
    digits = load_digits()
    for i in range(IMAGES):
        folder = root / f"digit{digits.target[i]}"
        folder.mkdir(exist_ok=True)
        Image.fromarray((digits.images[i] * 15.9).astype("uint8")).save(folder / f"{i:04d}.png")
    for folder in ("digit0", "digit9"):
        sorted((root / folder).iterdir())[-1].write_bytes(b"no picture")
    return root


@pytest.mark.slow
def test_an_evaluation_is_exact_over_processes(checkpoint, images, tmp_path):
    reports, tables = [], []
    for processes in (1, 2, 3):
        out, table = tmp_path / f"{processes}.json", tmp_path / f"{processes}.csv"
        given = [
            "eval", checkpoint, "--data-dir", images, "--batch-size", 32, "--workers", 1,
            "--json", out, "--per-class", table, "--max-unreadable", 0.01,
        ]  # fmt: skip
        printed, _ = finish(launch(given, processes))
        assert printed.count("cannot read image ") == 2
        report = json.loads(out.read_text())
        assert report.pop("img_per_s") > 0
        reports.append(report)
        tables.append(table.read_text())
    assert reports[0]["images"] == IMAGES - 2 and reports[0]["unreadable"] == 2
    assert tables[1] == tables[0] == tables[2]
    for report in reports[1:]:
        for key in ("top1", "top5", "images", "unreadable"):
            assert report[key] == reports[0][key]
        # Other batches, another rounding of the logits.
        for key in ("loss", "calibration_error"):
            assert report[key] == pytest.approx(reports[0][key], rel=1e-5)


@pytest.mark.slow
def test_statistics_of_a_batch_norm_are_those_that_are_saved(digit_tree, tmp_path):
    """Each process sees other images: what is evaluated, saved and resumed is the first one's."""
    run_dir = tmp_path / "run"
    given = [
        "--model", "test_resnet", "--img-size", 64, "--data-dir", digit_tree, "--batch-size", 6,
        "--workers", 0, "--epochs", 3, "--warmup-epochs", 1, "--lr", "1e-2", "--model-ema",
        "--log-interval", 1, "--resume", "auto",
    ]  # fmt: skip
    finish(launch([*given, "--run-dir", run_dir], processes=2))
    out = tmp_path / "out.json"
    finish(launch(["eval", run_dir / "last", "--data-dir", digit_tree, "--json", out]))
    told = [x for x in metrics(run_dir) if x["event"] == "eval"][-1]
    assert json.loads(out.read_text())["loss"] == pytest.approx(told["loss"], rel=1e-5)

    broken = shutil.copytree(run_dir, tmp_path / "broken", symlinks=True)
    shutil.rmtree(broken / "checkpoints" / "step-00000009")
    printed, _ = finish(launch([*given, "--run-dir", broken], processes=2))
    assert "resumed at step 6 of 9" in printed
    assert_same_run(broken, run_dir)

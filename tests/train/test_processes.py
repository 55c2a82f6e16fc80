"""Several processes evaluate and train as one."""

import json

import pytest
import timm
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import save_for_hf

import metala_vision  # noqa: F401  (registers the models)
from tests.train._runs import finish, launch

IMAGES = 1003


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

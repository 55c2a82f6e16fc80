"""The README's way from a folder of images to a deployed model, as it is written."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.train._runs import ROOT

pytestmark = [pytest.mark.launch, pytest.mark.slow]


def commands() -> list[str]:
    """Of the section on transfer."""
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^## Transfer to your images$(.*?)^## ", text, re.M | re.S)
    assert section is not None
    return re.findall(r"^    metala-vision (.+)$", section[1], re.M)


def sixty_images(folder):
    """Six classes of ten photographs' size: digits, enlarged, in colour and at odd sizes."""
    digits, draws = load_digits(), np.random.default_rng(0)
    for label in range(6):
        (folder / f"kind {label}").mkdir(parents=True)
        for i, pixels in enumerate(digits.images[digits.target == label][:10]):
            tint = draws.uniform(0.4, 1.0, 3)
            colour = (pixels[:, :, None] * 15.9 * tint).astype("uint8")
            size = int(draws.integers(64, 160)), int(draws.integers(64, 160))
            Image.fromarray(colour).resize(size, Image.Resampling.BICUBIC).save(
                folder / f"kind {label}" / f"IMG {i}.{('jpg', 'png')[i % 2]}"
            )


def test_from_sixty_images_to_a_deployed_model(tmp_path):
    lines = commands()
    assert [line.split()[0] for line in lines] == ["train", "predict", "features", "export"]
    sixty_images(tmp_path / "photos")
    said = {}
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-m", "metala_vision", *shlex.split(line)],
            cwd=tmp_path, capture_output=True, text=True, timeout=600,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
                 "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        said[line.split()[0]] = done.stdout
    top1 = re.findall(r"best ([\d.]+) %", said["train"].splitlines()[-1])
    assert float(top1[0]) >= 50  # of six classes; chance is 17
    assert (tmp_path / "predictions.png").stat().st_size > 20_000
    assert said["predict"].count("kind ") >= 300  # names of files and classes
    assert "(before training kNN " in said["features"]
    assert {"photos.onnx", "photos.onnx.json"} <= {p.name for p in tmp_path.iterdir()}

"""Real images as an ImageFolder tree, small models, and a clean slate for accelerate."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from sklearn.datasets import load_digits

pytest.register_assert_rewrite("tests.kernels._common")

# Two processes that compile one graph into one cache can read what the other has half written.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(
        tempfile.gettempdir(), f"metala_vision_inductor_{os.environ['PYTEST_XDIST_WORKER']}"
    )

# A backbone that trains a step in milliseconds; flags for the command line.
SMALL_MODEL = (
    "--model", "metala_nano", "--img-size", "32", "--patch-size", "8",
    "--model-kwargs", "embed_dim=32", "depth=2", "num_heads=1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps one state per process; every test starts without."""
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def digit_tree(tmp_path_factory) -> Path:
    """train/ and val/ with three classes of scikit-learn's digits as PNG files, 12 and 4 each."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for label in range(3):
        images = digits.images[digits.target == label][:16]
        for i, pixels in enumerate(images):
            folder = root / ("train" if i < 12 else "val") / f"digit{label}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((pixels * 15.9).astype("uint8")).resize((32, 32))
            image.convert("RGB").save(folder / f"{i:02d}.png")
    return root


@pytest.fixture
def own_digit_tree(digit_tree, tmp_path) -> Path:
    """A copy of digit_tree that a test may damage."""
    return Path(shutil.copytree(digit_tree, tmp_path / "data"))

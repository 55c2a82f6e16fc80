"""Where weights are, for tests: a folder, a file server, the Hub; disks that are full."""

import subprocess

import pytest
import torch

from metala_vision.weights import download, source

from ._base import FILES, NAME, repository, written
from ._server import Server, serving


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """No variable of the user's, and a cache of the test's."""
    for name in (source.WEIGHTS_VARIABLE, source.HUB_VARIABLE, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(download, "WAIT", 0.001)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder that METALA_VISION_WEIGHTS names; the test may change it."""
    monkeypatch.setenv(source.WEIGHTS_VARIABLE, str(tmp_path / "base"))
    return written(FILES, tmp_path / "base")


@pytest.fixture
def server(monkeypatch):
    with serving(Server({f"/below{name}": content for name, content in FILES.items()})) as running:
        monkeypatch.setenv(source.WEIGHTS_VARIABLE, f"{running.url}/below/")
        yield running


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that answers as the Hub does, where huggingface_hub looks for it."""
    from huggingface_hub import constants

    with serving(Server(repository(FILES, NAME), hub=True)) as running:
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv(source.HUB_VARIABLE, "owls")
        yield running


@pytest.fixture
def small_disk(tmp_path):
    """200 kB, less than the files of these tests."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)

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
    with serving(Server(repository(FILES, NAME), hub=True)) as running:
        hub_constants(monkeypatch, running.url, HF_HUB_CACHE=str(tmp_path / "hub"))
        monkeypatch.setenv(source.HUB_VARIABLE, "owls")
        yield running


def hub_constants(monkeypatch, url=None, **values):
    """What huggingface_hub has read from the environment when it was imported; some of its modules
    keep copies."""
    from huggingface_hub import _commit_api, constants, file_download, hf_api

    if url is not None:
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        values |= {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
    for name, value in values.items():
        for module in (constants, file_download, hf_api, _commit_api):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


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

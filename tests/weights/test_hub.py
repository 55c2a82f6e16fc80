"""Weights of the Hub, by huggingface_hub, from a server on this machine that answers as it does."""

import hashlib
import multiprocessing
import os
import subprocess
import sys

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load

from metala_vision.errors import WeightsError
from metala_vision.weights import source

from ._base import FILE, FILES, NAME, files_of, repository
from ._server import Fault
from .conftest import hub_constants

ROOT = f"/owls/{NAME}/resolve/main"
WEIGHTS = f"{ROOT}/model.safetensors"
SIZE = len(FILES[FILE])


@pytest.fixture(autouse=True)
def hub_of_this_test(hub, monkeypatch):
    """huggingface_hub waits up to 8 seconds between two tries."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    for module in (file_download, _http):
        if hasattr(module, "time"):
            monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    yield hub
    for path in (p for p in blobs() if not p.name.endswith(".incomplete")):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name  # whole, and right


def blobs():
    from pathlib import Path

    return [p for p in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if p.is_file()]


def loads():
    model = timm.create_model(NAME, pretrained=True)
    state = load(FILES[FILE])
    return all(torch.equal(x, state[k].float()) for k, x in model.state_dict().items())


def refused():
    with pytest.raises(WeightsError) as caught:
        timm.create_model(NAME, pretrained=True)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_it_is_brought_once(hub):
    assert loads() and loads()
    assert len(hub.gets(WEIGHTS)) == 1


@pytest.mark.parametrize("tenth", range(1, 10))
def test_a_cut_is_gone_on_with(tenth, hub, monkeypatch):
    hub_constants(monkeypatch, DOWNLOAD_CHUNK_SIZE=2**16)  # what a cut loses at most; 10 MB
    cut = SIZE * tenth // 10
    hub.fault = lambda path, number: Fault(cut=cut) if number == 1 and path == WEIGHTS else None
    assert loads()
    starts = hub.gets(WEIGHTS)
    assert len(starts) == 2 and starts[0] == 0 and cut - 2**16 < starts[1] <= cut


def test_another_sha256_is_refused_and_removed(hub):
    """With the Hub's own name for the right one, which huggingface_hub would keep for ever."""
    hub.lies[WEIGHTS] = FILES[FILE][:-1] + bytes([FILES[FILE][-1] ^ 1])
    line = refused()
    assert f"owls/{NAME} is not what its manifest says and was removed: " in line
    assert not any(p.stat().st_size == SIZE for p in blobs())
    hub.lies.clear()
    assert loads()


def test_nobody_has_it(hub):
    hub.files.clear()
    line = refused()
    assert line.startswith(f"no weights for {NAME} in this package, owls/{NAME} on the Hub; ")


def test_a_gated_repository_says_so(hub):
    hub.gated = True
    line = refused()
    assert line == f"owls/{NAME} is gated: accept its terms on the Hub, then `hf auth login`"


def test_a_repository_without_a_file(hub):
    del hub.files[f"{ROOT}/manifest.json"]
    assert f"no weights for {NAME}" in refused()


def test_a_repository_of_another_tag(hub):
    other = repository(files_of("hgrn_nano.other"), "hgrn_nano.other")
    hub.files[f"{ROOT}/manifest.json"] = other["/owls/hgrn_nano.other/resolve/main/manifest.json"]
    assert refused() == f"the manifest of owls/{NAME} has no {NAME}"


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_server_in_trouble_is_one_line(status, hub):
    hub.fault = lambda path, number: Fault(status=status)
    line = refused()
    assert f"manifest.json of owls/{NAME}" in line and str(status) in line


def test_a_stalled_server_is_left(hub, monkeypatch):
    hub_constants(monkeypatch, HF_HUB_DOWNLOAD_TIMEOUT=0.2)
    hub.fault = lambda path, number: Fault(stall=0) if path == WEIGHTS else None
    line = refused()
    assert f"cannot get model.safetensors of owls/{NAME}: " in line and "timed out" in line.lower()


def test_what_was_brought_is_there_offline(hub, monkeypatch):
    hub_constants(monkeypatch, HF_HUB_OFFLINE=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refused()
    assert f"manifest.json of owls/{NAME}: HF_HUB_OFFLINE is set; it is not in the cache" in line
    assert hub.requests == []
    hub_constants(monkeypatch, HF_HUB_OFFLINE=False)
    assert loads()
    hub_constants(monkeypatch, HF_HUB_OFFLINE=True)
    count = len(hub.requests)
    assert loads() and len(hub.requests) == count


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_full_disk_is_one_line(hub, small_disk, monkeypatch):
    hub_constants(monkeypatch, HF_HUB_CACHE=str(small_disk))
    assert "No space left on device" in refused()


def test_a_cache_that_cannot_be_written_is_read(hub, small_disk, monkeypatch):
    hub_constants(monkeypatch, HF_HUB_CACHE=str(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in refused()
    subprocess.run(["mount", "-o", "remount,rw,size=40m", str(small_disk)], check=True)
    assert loads()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert loads()


def test_cache_dir_is_the_users(hub, tmp_path):
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").rglob("model.safetensors")) and not blobs()


def _child():
    os._exit(0 if source.locate(NAME) is not None else 1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_at_once(hub):
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_child) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0] and loads()


@pytest.mark.launch
def test_the_variables_are_those_of_the_hub(hub, tmp_path):
    """In a process of its own: huggingface_hub reads them once, as it is imported."""
    code = (
        "import timm, metala_vision; "
        f"m = timm.create_model({NAME!r}, pretrained=True); print(m.pretrained_cfg['tag'])"
    )
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "own\n", done.stderr
    environment["HF_HUB_OFFLINE"], environment["HF_ENDPOINT"] = "1", "http://127.0.0.1:1"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "own\n", done.stderr

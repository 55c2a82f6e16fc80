"""Downloads from a plain file server that fails in every way: the file is whole, or not there."""

import hashlib
import http.client
import multiprocessing
import os
import signal
import socket
import ssl
import subprocess
import time

import numpy as np
import pytest
from filelock import FileLock

from metala_vision.errors import WeightsError
from metala_vision.weights import download
from metala_vision.weights.download import Unreachable, fetch, fetch_text
from metala_vision.weights.manifest import Entry

from ._server import Fault, Server, serving

SIZE = 300_007  # no multiple of a block
CONTENT = np.random.default_rng(0).bytes(SIZE)
FILE = "/folder/weights.safetensors"
TENTHS = [SIZE * tenth // 10 for tenth in range(1, 10)]


def entry_of(content):
    return Entry(
        file="weights.safetensors", size=len(content), sha256=hashlib.sha256(content).hexdigest(),
        dataset="none", recipe="none", license="none", num_classes=1,
        preprocessing={"input_size": (1, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0,
                       "crop_mode": "center", "mean": (0.5,), "std": (0.5,)},
    )  # fmt: skip


ENTRY = entry_of(CONTENT)


@pytest.fixture
def server():
    with serving(Server({FILE: CONTENT, "/text": b"words"})) as running:
        yield running


@pytest.fixture
def cache(tmp_path):
    """Where a file is to come; at the end it is whole, or not there."""
    path = tmp_path / "cache" / "weights.safetensors"
    yield path
    assert not path.exists() or path.read_bytes() == CONTENT


def kept(path):
    part = path.with_name(f"{path.name}.part")
    return part.read_bytes() if part.exists() else None


def refused(server, path, entry=ENTRY):
    """The one line of a download that fails."""
    with pytest.raises(WeightsError) as caught:
        fetch(server.url + FILE, path, entry)
    line = str(caught.value)
    assert "\n" not in line and not path.exists()
    return line


def test_it_is_brought_once(server, cache):
    assert fetch(server.url + FILE, cache, ENTRY) == cache
    assert cache.read_bytes() == CONTENT and kept(cache) is None
    assert fetch(server.url + FILE, cache, ENTRY) == cache
    assert server.gets(FILE) == [0]


def test_a_server_that_cuts_every_answer_is_asked_for_the_rest(server, cache):
    server.fault = lambda path, number: Fault(cut=SIZE // 10)
    fetch(server.url + FILE, cache, ENTRY)
    assert server.gets(FILE) == [SIZE // 10 * i for i in range(11)]


@pytest.mark.parametrize("place", TENTHS)
def test_the_next_call_goes_on_where_a_cut_was(place, server, cache):
    server.fault = lambda path, number: Fault(cut=place) if number == 1 else Fault(status=503)
    line = refused(server, cache)
    assert line.endswith(
        f"503 Service Unavailable; {place:,} of {SIZE:,} bytes are kept, the next try goes on there"
    )
    assert kept(cache) == CONTENT[:place]
    server.fault = lambda path, number: None
    fetch(server.url + FILE, cache, ENTRY)
    assert server.gets(FILE)[-1] == place and kept(cache) is None


def test_a_server_without_ranges_begins_again(server, cache):
    def fault(path, number):
        return Fault(cut=SIZE // 2) if number == 1 else Fault(whole=True)

    server.fault = fault
    fetch(server.url + FILE, cache, ENTRY)
    assert server.gets(FILE) == [0, SIZE // 2]


def test_what_is_kept_of_another_file_is_not_used(server, cache):
    cache.parent.mkdir()
    part = cache.with_name(f"{cache.name}.part")
    part.write_bytes(b"x" * 1000)
    assert "was removed" in refused(server, cache)
    assert kept(cache) is None
    part.write_bytes(b"x" * (SIZE + 1))  # longer than the whole
    fetch(server.url + FILE, cache, ENTRY)


def test_another_sha256_is_refused_and_removed(server, cache):
    server.files[FILE] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    line = refused(server, cache)
    assert "is not what its manifest says and was removed" in line
    assert f"the manifest says {ENTRY.sha256}" in line and kept(cache) is None
    server.files[FILE] = CONTENT
    fetch(server.url + FILE, cache, ENTRY)


def test_a_file_of_another_length_is_refused_before_it_is_brought(server, cache):
    for content in (CONTENT[:-5], CONTENT + b"more"):
        server.files[FILE] = content
        line = refused(server, cache)
        assert line.endswith(f"has {len(content):,} bytes, its manifest says {SIZE:,}")
        assert kept(cache) == b""
    assert server.gets(FILE) == [0, 0]


def test_a_page_in_its_place_leaves_what_is_kept(server, cache):
    cache.parent.mkdir()
    cache.with_name(f"{cache.name}.part").write_bytes(CONTENT[:1000])
    server.lies[FILE] = b"please log in"
    server.fault = lambda path, number: Fault(whole=True)
    assert "has 13 bytes, its manifest says" in refused(server, cache)
    assert kept(cache) == CONTENT[:1000]
    server.lies.clear()
    server.fault = lambda path, number: None
    fetch(server.url + FILE, cache, ENTRY)
    assert server.gets(FILE)[-1] == 1000


@pytest.mark.parametrize("error", [OSError(113, "No route to host"), ssl.SSLError(1, "[SSL] x")])
def test_a_fault_of_the_way_here_is_not_one_of_the_disk(error, server, cache, monkeypatch):
    def fail(*arguments, **named):
        raise error

    monkeypatch.setattr(http.client.HTTPResponse, "read1", fail)
    line = refused(server, cache)
    assert line.startswith(f"cannot download {server.url}{FILE}: ")
    with pytest.raises(Unreachable):
        fetch_text(server.url + "/text")
    monkeypatch.setattr(download.urllib.request, "urlopen", fail)
    assert refused(server, cache).startswith(f"cannot download {server.url}{FILE}: ")


def test_a_lock_that_is_left_behind_is_named(server, cache, monkeypatch):
    monkeypatch.setattr(download, "LOCK_WAIT", 0.1)
    cache.parent.mkdir()
    with FileLock(cache.with_name(f"{cache.name}.lock")):
        line = refused(server, cache)
    assert f"if there is none, remove {cache}.lock" in line


def test_more_than_was_promised_is_refused(server, cache):
    """Though the header says otherwise: a disk is not filled by a server that does not end."""

    def more(handler, body):
        server.requests.append(("GET", handler.path, 0))
        handler.send_response(200)
        handler.send_header("Connection", "close")  # no length
        handler.end_headers()
        for _ in range(4):
            handler.wfile.write(CONTENT)

    server.RequestHandlerClass = type("Endless", (server.RequestHandlerClass,), {"answer": more})
    assert f"sends more than the {SIZE:,} bytes of its manifest" in refused(server, cache)
    assert kept(cache) == b""


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_told_at_once(status, server, cache):
    server.fault = lambda path, number: Fault(status=status)
    assert f"cannot download {server.url}{FILE}: {status} " in refused(server, cache)
    assert len(server.gets(FILE)) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_in_trouble_is_asked_again(status, server, cache):
    server.fault = lambda path, number: Fault(status=status)
    assert f": {status} " in refused(server, cache)
    assert len(server.gets(FILE)) == download.TRIES
    server.requests.clear()
    server.fault = lambda path, number: Fault(status=status) if number < 3 else None
    fetch(server.url + FILE, cache, ENTRY)


def test_a_stalled_server_is_left_and_the_rest_asked_for(server, cache, monkeypatch):
    monkeypatch.setenv(download.TIMEOUT_VARIABLE, "0.2")
    server.fault = lambda path, number: Fault(stall=100_000) if number == 1 else None
    fetch(server.url + FILE, cache, ENTRY)
    assert server.gets(FILE) == [0, 100_000]
    cache.unlink()
    server.requests.clear()
    server.fault = lambda path, number: Fault(stall=0)
    assert "no answer in time" in refused(server, cache)
    assert len(server.gets(FILE)) == download.TRIES


def test_nobody_is_there(cache):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}{FILE}"
        with pytest.raises(Unreachable, match="Connection refused"):
            fetch(url, cache, ENTRY)


def test_a_damaged_file_in_the_cache_is_brought_anew(server, cache):
    cache.parent.mkdir()
    cache.write_bytes(CONTENT[:-1] + b"x")
    fetch(server.url + FILE, cache, ENTRY)
    assert cache.read_bytes() == CONTENT


def test_a_timeout_that_is_none(server, cache, monkeypatch):
    for given in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv(download.TIMEOUT_VARIABLE, given)
        assert refused(server, cache).endswith("is no number of seconds")


def test_text_comes_whole_or_not(server, monkeypatch):
    assert fetch_text(server.url + "/text") == b"words"
    server.fault = lambda path, number: Fault(cut=2)
    with pytest.raises(Unreachable, match="only 2 of 5 bytes came"):
        fetch_text(server.url + "/text")
    server.fault = lambda path, number: Fault(status=404)
    with pytest.raises(WeightsError, match="404"):
        fetch_text(server.url + "/text")
    monkeypatch.setattr(download, "LARGEST_TEXT", 3)
    server.fault = lambda path, number: None
    with pytest.raises(WeightsError, match="more than 3 bytes"):
        fetch_text(server.url + "/text")


def test_a_disk_without_room_is_told_before(server, small_disk):
    line = refused(server, small_disk / "weights.safetensors")
    assert f"{SIZE:,} bytes are needed and" in line and "TORCH_HOME or cache_dir" in line
    assert server.gets(FILE) == []


def test_a_disk_that_fills_up_meanwhile(server, small_disk, monkeypatch):
    usage = download.shutil.disk_usage
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda path: usage(path)._replace(free=10**9)
    )
    path = small_disk / "weights.safetensors"
    assert "No space left on device" in refused(server, path)
    assert kept(path) is None  # its room is free again


def test_a_cache_that_cannot_be_written(server, small_disk, cache):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = refused(server, small_disk / "weights.safetensors")
    assert "Read-only file system; TORCH_HOME or cache_dir=FOLDER names another" in line
    subprocess.run(["mount", "-o", "remount,rw,size=9m", str(small_disk)], check=True)
    path = fetch(server.url + FILE, small_disk / "weights.safetensors", ENTRY)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert fetch("http://127.0.0.1:1/nobody", path, ENTRY) == path  # what is there is used


def test_a_file_in_the_place_of_the_cache(server, tmp_path):
    (tmp_path / "file").touch()
    assert f"cannot write {tmp_path / 'file'}" in refused(server, tmp_path / "file" / "weights")


def _child(url, path):
    os._exit(0 if fetch(url, path, ENTRY).read_bytes() == CONTENT else 1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_at_once_bring_it_once(server, cache):
    server.fault = lambda path, number: Fault(cut=SIZE // 4)  # which takes a while
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_child, args=(server.url + FILE, cache)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
    assert server.gets(FILE) == [SIZE // 4 * i for i in range(5)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_download_is_gone_on_with(server, cache):
    server.fault = lambda path, number: Fault(stall=SIZE // 2) if number == 1 else None
    child = multiprocessing.get_context("fork").Process(
        target=_child, args=(server.url + FILE, cache)
    )
    child.start()
    end = time.monotonic() + 20
    while (kept(cache) or b"") != CONTENT[: SIZE // 2] and time.monotonic() < end:
        time.sleep(0.01)
        if len(kept(cache) or b"") > SIZE // 2 - 70_000:
            break  # the last block may stand in the process's buffer
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    have = len(kept(cache))
    assert 0 < have <= SIZE // 2 and not cache.exists()
    fetch(server.url + FILE, cache, ENTRY)
    assert server.gets(FILE) == [0, have]

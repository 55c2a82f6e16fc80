"""One file from an http(s) server into the cache: resumed, checked, whole or not at all.

The Hub's files come by huggingface_hub; this is for a plain file server.
"""

import contextlib
import errno
import http.client
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from metala_vision._version import __version__
from metala_vision.errors import WeightsError, one_line

from .check import check_file
from .manifest import Entry

TRIES = 3  # in a row that bring nothing
LOCK_WAIT = 1800  # seconds
WAIT = 0.5  # seconds before the second, then twice as long
BLOCK = 2**16
LARGEST_TEXT = 2**24  # bytes of a manifest
TIMEOUT_VARIABLE = "HF_HUB_DOWNLOAD_TIMEOUT"  # the Hub's, in seconds
AGAIN = {408, 425, 429, 500, 502, 503, 504}
# What a server or the way to it may do at any line.
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class Unreachable(WeightsError):
    """The server does not answer."""


def fetch_text(url: str) -> bytes:
    """A small file, whole. Raises WeightsError; Unreachable where the server does not answer."""
    for last in _tries():
        try:
            with _open(url, 0) as answer:
                text = b""
                while len(text) <= LARGEST_TEXT and (block := _next(answer)):
                    text += block
            length = answer.headers.get("Content-Length")
            if len(text) > LARGEST_TEXT:
                raise WeightsError(f"{url} has more than {LARGEST_TEXT:,} bytes")
            if length is not None and length.isdecimal() and len(text) < int(length):
                raise ConnectionResetError(f"only {len(text):,} of {length} bytes came")
            return text
        except NETWORK_ERRORS as error:
            _raise_what_stays(url, error, last, "")
    raise AssertionError


def fetch(url: str, path: Path, entry: Entry) -> Path:
    """The file as `path`, which is there already, or is whole and right when it gets its name.

    What has come is kept beside it, as .part, and the next call goes on behind it.

    Raises:
        WeightsError: cut or stalled after several tries, refused, of another sha256, no room.
    """
    with contextlib.suppress(WeightsError):
        check_file(path, entry)
        return path  # without a lock: the cache may be read-only
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=LOCK_WAIT):
            if path.exists():
                try:
                    check_file(path, entry)  # another process was first
                    return path
                except WeightsError:
                    path.unlink()  # was damaged since
            _fill(url, part, entry)
            try:
                check_file(part, entry)
            except WeightsError as error:
                part.unlink()
                raise WeightsError(
                    f"{url} is not what its manifest says and was removed: {error.line}"
                ) from error
            part.replace(path)
            return path
    except Timeout as error:
        raise WeightsError(
            f"another process has been downloading {path.name} for {LOCK_WAIT} seconds; if there "
            f"is none, remove {error.lock_file}"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                part.unlink()
        reason = error.strerror or one_line(error)
        raise WeightsError(
            f"cannot write {path.parent}: {reason}; TORCH_HOME or cache_dir=FOLDER names another"
        ) from error


def _fill(url: str, part: Path, entry: Entry) -> None:
    """Append to `part` until it has the entry's size."""
    have = part.stat().st_size if part.exists() else 0
    if have > entry.size:
        part.unlink()
        have = 0
    free = shutil.disk_usage(part.parent).free
    if free < entry.size - have:
        raise OSError(errno.ENOSPC, f"{entry.size - have:,} bytes are needed and {free:,} are free")
    bar = tqdm(
        total=entry.size, initial=have, unit="B", unit_scale=True, unit_divisor=1024,
        desc=entry.file, disable=None, leave=False,
    )  # fmt: skip
    with bar, part.open("ab") as file:
        failures = 0
        while have < entry.size:
            before = have
            try:
                with _open(url, have) as answer:
                    total = _total(answer)
                    if total not in (None, entry.size):  # a page that asks for a login, say
                        raise WeightsError(
                            f"{url} has {total:,} bytes, its manifest says {entry.size:,}"
                        )
                    if have and not _goes_on(answer, have):
                        file.truncate(0)
                        have = 0
                        bar.reset(entry.size)
                    while block := _next(answer):
                        if have + len(block) > entry.size:
                            file.truncate(0)
                            raise WeightsError(
                                f"{url} sends more than the {entry.size:,} bytes of its manifest"
                            )
                        file.write(block)
                        have += len(block)
                        bar.update(len(block))
                if have < entry.size:
                    raise ConnectionResetError("the connection was closed")
            except NETWORK_ERRORS as error:
                failures = failures + 1 if have <= before else 1
                file.flush()
                if getattr(error, "code", None) == 416:  # the server's file ends before
                    file.truncate(0)
                    have = 0
                kept = f"; {have:,} of {entry.size:,} bytes are kept, the next try goes on there"
                _raise_what_stays(url, error, failures >= TRIES, kept if have else "")
                time.sleep(WAIT * 2 ** (failures - 1))
        file.flush()
        os.fsync(file.fileno())


def _goes_on(answer: HTTPResponse, have: int) -> bool:
    """Whether it is the part asked for; a server may send the whole file instead."""
    given = answer.headers.get("Content-Range", "")
    return answer.status == 206 and given.replace("=", " ").startswith(f"bytes {have}-")


def _total(answer: HTTPResponse) -> int | None:
    """Bytes of the whole file, where the server says so."""
    if answer.status == 206:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = answer.headers.get("Content-Length", "")
    return int(total) if total.isdecimal() else None


def _open(url: str, start: int) -> HTTPResponse:
    headers = {"User-Agent": f"metala-vision/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    given = os.environ.get(TIMEOUT_VARIABLE, "10")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise WeightsError(f"{TIMEOUT_VARIABLE}={given!r} is no number of seconds")
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=seconds)
    except NETWORK_ERRORS:
        raise
    except OSError as error:
        raise ConnectionError(one_line(error.strerror or error)) from error


def _next(answer: HTTPResponse) -> bytes:
    """What is there: a stall loses nothing. An OSError of the way here is one of the network."""
    try:
        return answer.read1(BLOCK)
    except NETWORK_ERRORS:
        raise
    except OSError as error:
        raise ConnectionError(one_line(error.strerror or error)) from error


def _tries() -> Iterator[bool]:
    """Whether it is the last, one by one, with a pause between them."""
    for number in range(TRIES):
        if number:
            time.sleep(WAIT * 2 ** (number - 1))
        yield number == TRIES - 1


def _raise_what_stays(url: str, error: Exception, last: bool, kept: str) -> None:
    """Unless another try may help."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        reason = f"{error.code} {error.reason}"
        if error.code not in AGAIN:
            raise WeightsError(f"cannot download {url}: {reason}") from error
    else:
        cause: Any = getattr(error, "reason", error)
        timed_out = isinstance(cause, TimeoutError)
        reason = "no answer in time" if timed_out else one_line(cause) or type(cause).__name__
    if last:
        raise Unreachable(f"cannot download {url}: {reason}{kept}") from error


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE asks for no network, in huggingface_hub's words."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def url_below(base: str, name: str) -> str:
    """The address of a file in a folder of a server."""
    return f"{base.rstrip('/')}/{urllib.parse.quote(name)}"

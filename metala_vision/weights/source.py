"""Where the weights of a tag are: in this package, in a folder, on a file server or on the Hub.

    METALA_VISION_WEIGHTS   a folder, or the http(s) address of one: manifest.json and files below
    METALA_VISION_HUB       a namespace of the Hub: MODEL.TAG is the repository NAMESPACE/MODEL.TAG
    HF_HUB_OFFLINE          1: nothing but what is here already

What ships with the package comes first: it is there without a network.
"""

import functools
import hashlib
import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metala_vision.errors import WeightsError, one_line

from .check import check_entry, check_file
from .download import Unreachable, fetch, fetch_text, is_offline, url_below
from .manifest import MANIFEST_FILE, Entry, Manifest, parse_manifest, read_manifest

WEIGHTS_VARIABLE = "METALA_VISION_WEIGHTS"
HUB_VARIABLE = "METALA_VISION_HUB"
OFFLINE = "HF_HUB_OFFLINE is set"
HERE = Path(__file__).parent
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Weights:
    """Those of one tag: what its manifest says, and the file, checked against it."""

    tag: str
    entry: Entry
    path: Path


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where downloads from a file server are kept: `cache_dir`, else below torch.hub's folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(torch.hub.get_dir()) / "metala_vision"


@functools.cache
def shipped() -> Manifest:
    """Of this package."""
    return read_manifest(HERE / MANIFEST_FILE)


def configured_base() -> str | None:
    """What METALA_VISION_WEIGHTS names: a folder that is there, or an http(s) address."""
    given = os.environ.get(WEIGHTS_VARIABLE)
    if not given:
        return None
    if "://" in given:
        return _address(given)
    try:
        folder = Path(given).expanduser()
    except RuntimeError as error:  # ~ of a user who is not there
        raise WeightsError(f"{WEIGHTS_VARIABLE}={given} is no folder") from error
    if not folder.is_dir():
        raise WeightsError(f"{WEIGHTS_VARIABLE}={given} is no folder")
    return str(folder)


def _address(given: str) -> str:
    """Of a folder on a file server, its path quoted."""
    try:
        parts = urllib.parse.urlsplit(given)
        host, port = parts.hostname, parts.port  # which may raise too
    except ValueError as error:
        raise WeightsError(f"{WEIGHTS_VARIABLE}={given}: {one_line(error)}") from error
    if parts.username or parts.password:
        raise WeightsError(
            f"{WEIGHTS_VARIABLE}: the address of {host} holds a user or a password, which is not "
            "supported"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise WeightsError(f"{WEIGHTS_VARIABLE}={given}: a folder, http:// or https:// is accepted")
    if parts.query or parts.fragment:
        raise WeightsError(f"{WEIGHTS_VARIABLE}={given}: the address of a folder has no ? or #")
    name = host.encode("idna").decode() if not host.isascii() else host
    name = f"[{name}]" if ":" in name else name
    where = name if port is None else f"{name}:{port}"
    path = urllib.parse.quote(parts.path.rstrip("/"), safe="/%+~")
    return f"{parts.scheme}://{where}{path}"


def base_manifest(base: str, cache_dir: str | Path | None = None) -> Manifest:
    """Of a folder or a file server; without a connection, as the server last sent it.

    Raises:
        WeightsError: where there is none, or it is not one.
    """
    if not _is_web(base):
        return read_manifest(Path(base) / MANIFEST_FILE)
    url = url_below(base, MANIFEST_FILE)
    name = hashlib.sha256(base.encode()).hexdigest()[:16]
    kept = cache_folder(cache_dir) / f"manifest-{name}.json"
    try:
        if is_offline():
            raise Unreachable(f"{OFFLINE}, and {url} was never read")
        text = fetch_text(url)
    except Unreachable:
        if kept.is_file():
            return read_manifest(kept)
        raise
    manifest = parse_manifest(text, url)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_name(f"{kept.name}.{os.getpid()}")
        fresh.write_bytes(text)
        fresh.replace(kept)
    except OSError:
        pass  # it is for the day without a connection alone
    return manifest


def locate(tag: str, cache_dir: str | Path | None = None) -> Weights | None:
    """The weights of MODEL.TAG, downloaded where they are not here; None where nobody has them.

    Raises:
        WeightsError: a network that fails, a file that is not what its manifest says, no room.
    """
    ours = shipped().weights.get(tag)
    if ours is not None and (HERE / ours.file).is_file():
        return _checked(tag, ours, HERE / ours.file)
    base, namespace = configured_base(), configured_namespace()
    silent: WeightsError | None = None
    theirs: Entry | None = None
    if base is not None:
        try:
            theirs = base_manifest(base, cache_dir).weights.get(tag)
        except Unreachable as error:
            silent = error  # the Hub may have it
    if base is not None and theirs is not None:
        # Where this package knows the tag, the file must be the one that it knows.
        entry = ours or theirs
        return _checked(tag, entry, _from_base(base, tag, theirs.file, entry, cache_dir))
    found = _from_hub(f"{namespace}/{tag}", tag, ours, cache_dir) if namespace else None
    if found is None and silent is not None:
        raise silent
    return found


def tags_of(architecture: str, cache_dir: str | Path | None = None) -> list[str]:
    """Of a model, those that ship and those that METALA_VISION_WEIGHTS has."""
    base, tags = configured_base(), shipped().tags(architecture)
    more = base_manifest(base, cache_dir).tags(architecture) if base else []
    return list(dict.fromkeys([*tags, *more]))


def configured_namespace() -> str | None:
    """What METALA_VISION_HUB names."""
    given = os.environ.get(HUB_VARIABLE)
    if given and not _NAMESPACE.fullmatch(given):
        raise WeightsError(f"{HUB_VARIABLE}={given!r} is no namespace of the Hub")
    return given or None


def cached_file(tag: str, entry: Entry, cache_dir: str | Path | None = None) -> Path:
    """Where a download from a file server is kept; another file of the tag has another name."""
    return cache_folder(cache_dir) / f"{tag}-{entry.sha256[:16]}.safetensors"


def _is_web(base: str) -> bool:
    return base.startswith(("http://", "https://"))


def _checked(tag: str, entry: Entry, path: Path) -> Weights:
    check_file(path, entry)
    check_entry(path, entry)
    return Weights(tag, entry, path)


def _from_base(base: str, tag: str, file: str, entry: Entry, cache_dir: str | Path | None) -> Path:
    if not _is_web(base):
        path = Path(base) / file
        if not path.resolve().is_relative_to(Path(base).resolve()):
            raise WeightsError(f"{path} leads out of {base}")
        return path
    url = url_below(base, file)
    path = cached_file(tag, entry, cache_dir)
    if is_offline() and not path.is_file():
        raise WeightsError(f"{OFFLINE}, and {url} is not in {path.parent}")
    return fetch(url, path, entry)


def _from_hub(
    repository: str, tag: str, ours: Entry | None, cache_dir: str | Path | None
) -> Weights | None:
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        if ours is None:
            text = _hub_file(repository, MANIFEST_FILE, cache_dir).read_bytes()
            theirs = parse_manifest(text, f"{repository}/{MANIFEST_FILE}").weights.get(tag)
            if theirs is None:
                raise WeightsError(f"the manifest of {repository} has no {tag}")
            entry, name = theirs, theirs.file
        else:
            entry, name = ours, Path(ours.file).name
        path = _hub_file(repository, name, cache_dir)
    except (RepositoryNotFoundError, EntryNotFoundError):
        return None
    try:
        return _checked(tag, entry, path)
    except WeightsError as error:
        # The link, and what it leads to; the Hub's cache would answer with it for ever.
        for gone in (path.resolve(), path):
            try:
                gone.unlink(missing_ok=True)
            except OSError as left:
                raise WeightsError(f"{error.line}; cannot remove it: {left.strerror}") from left
        raise WeightsError(
            f"{repository} is not what its manifest says and was removed: {error.line}"
        ) from error


def _hub_file(repository: str, name: str, cache_dir: str | Path | None) -> Path:
    """By huggingface_hub, with its cache, its offline mode and its errors as one line."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    extra: dict[str, Any] = {} if cache_dir is None else {"cache_dir": cache_dir}
    try:
        return Path(hf_hub_download(repository, name, library_name="metala-vision", **extra))
    except GatedRepoError as error:
        raise WeightsError(
            f"{repository} is gated: accept its terms on the Hub, then `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        why = OFFLINE if is_offline() else one_line(error.__cause__ or error)
        raise WeightsError(
            f"cannot get {name} of {repository}: {why}; it is not in the cache"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError):
        raise
    except Exception as error:  # of the network, of the disk: huggingface_hub's own and others
        reason = one_line(error) or type(error).__name__
        raise WeightsError(f"cannot get {name} of {repository}: {reason[:300]}") from error

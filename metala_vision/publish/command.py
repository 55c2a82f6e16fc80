"""`metala-vision weights list|download|verify|publish|push`."""

import argparse
import os
from pathlib import Path
from typing import Any

import timm

from metala_vision import models
from metala_vision.errors import UserError, WeightsError, nearest
from metala_vision.models.pretrained import missing, resolve_tag
from metala_vision.weights import locate, shipped
from metala_vision.weights.manifest import Entry
from metala_vision.weights.source import (
    HERE,
    HUB_VARIABLE,
    WEIGHTS_VARIABLE,
    base_manifest,
    cached_file,
    configured_base,
    configured_namespace,
)

from .export import DTYPES, Publication, publish
from .push import check_name, push, tag_of
from .verify import as_line, verify_folder, verify_tag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of each of the five."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    kinds.add_parser("list", help="the tags that there are, and where").set_defaults(run=_list)

    download = kinds.add_parser("download", help="bring weights here, for a time without a network")
    download.add_argument("names", nargs="+", metavar="MODEL[.TAG]")
    download.add_argument("--cache-dir", type=Path, help="as timm's cache_dir")
    download.set_defaults(run=_download)

    verify = kinds.add_parser("verify", help="size, sha256, kind, shapes and values of weights")
    verify.add_argument(
        "names", nargs="*", metavar="MODEL[.TAG]|FOLDER",
        help="a tag, or a folder with a manifest; none: all that ship",
    )  # fmt: skip
    verify.set_defaults(run=_verify)

    out = kinds.add_parser("publish", help="export a run for others")
    out.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    out.add_argument("--out", type=Path, required=True, help=f"folder; one for {WEIGHTS_VARIABLE} "
                     "where there is a tag")  # fmt: skip
    out.add_argument("--tag", help="OUT/MODEL.TAG is written, and OUT/manifest.json")
    out.add_argument("--license", required=True, help="in the Hub's words: apache-2.0, other, ...")
    out.add_argument("--terms", help="of the data, or of another license, in a sentence")
    out.add_argument("--dataset", help="what it was trained on [the name of its folder]")
    out.add_argument("--recipe", help="name of the configuration [that of the command]")
    out.add_argument("--checkpoint", choices=["last", "best"], default="last", help="[last]")
    out.add_argument("--no-ema", dest="ema", action="store_false", help="the weights themselves, "
                     "where the run averaged them")  # fmt: skip
    out.add_argument("--dtype", choices=DTYPES, default="float32", help="of the file [float32]")
    out.add_argument("--data-dir", type=Path, help="evaluate the file on its val/ for the card")
    out.add_argument("--workers", type=int, default=4, help="for that evaluation [4]")
    out.add_argument("--replace", action="store_true", help="write over what is there")
    out.add_argument("--push", metavar="NAMESPACE/NAME", help="upload it to the Hub; with a tag "
                     "NAME is MODEL.TAG")  # fmt: skip
    out.add_argument("--private", action="store_true", help="a repository of the Hub that is new")
    out.set_defaults(run=_publish)

    again = kinds.add_parser("push", help="upload a published folder to the Hub")
    again.add_argument("folder", type=Path, metavar="FOLDER")
    again.add_argument("repository", metavar="NAMESPACE/NAME")
    again.add_argument("--private", action="store_true", help="a repository of the Hub that is new")
    again.set_defaults(run=_push)


def run(given: argparse.Namespace) -> int:
    """The exit status; the lines are printed."""
    return given.run(given)


def _list(given: argparse.Namespace) -> int:
    rows: list[tuple[str, ...]] = [("weights", "MB", "data", "top-1", "license", "where")]
    base, namespace = configured_base(), configured_namespace()
    for name, entry in shipped().weights.items():
        rows.append(_row(name, entry, "ships" if (HERE / entry.file).is_file() else "not here"))
    fault, theirs = None, {}
    try:
        theirs = base_manifest(base).weights if base else {}
    except WeightsError as error:
        fault = error
    for name, entry in theirs.items():
        if name not in shipped().weights:
            kept = cached_file(name, entry).is_file()
            rows.append(_row(name, entry, f"{base}{', downloaded' if kept else ''}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    if base is None:
        print(f"{WEIGHTS_VARIABLE} names a folder or an http(s) address that has more")
    where = f"{namespace}/MODEL.TAG" if namespace else f"set by {HUB_VARIABLE}"
    print(f"repositories of the Hub: {where}")
    if fault is not None:
        raise fault
    return 0


def _row(name: str, entry: Entry, where: str) -> tuple[str, ...]:
    top1 = "-" if entry.metrics is None else f"{entry.metrics.top1:.2f}"
    return name, f"{entry.size / 1e6:.1f}", entry.dataset, top1, entry.license, where


def _tag(name: str, cache_dir: Path | None = None) -> str:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f"unknown model {name!r}{nearest(architecture, models.list_models())}")
    if architecture not in models.list_models():
        raise UserError(f"{name} is timm's: timm downloads its weights")
    return resolve_tag(name, cache_dir)


def _download(given: argparse.Namespace) -> int:
    for name in given.names:
        tag = _tag(name, given.cache_dir)
        found = locate(tag, given.cache_dir)
        if found is None:
            raise missing(tag)
        print(f"{tag}  {found.path}")
    return 0


def _verify(given: argparse.Namespace) -> int:
    status = 0
    for name in given.names or shipped().weights:
        outcomes: list[tuple[str, Any]]
        try:
            folder = Path(name)
            if folder.is_dir():
                outcomes = verify_folder(folder)
            elif os.sep in name:
                raise UserError("no such folder")
            else:
                tag = _tag(name)
                outcomes = [(tag, verify_tag(tag))]
        except UserError as error:
            outcomes, status = [(name, error)], 1
        for each, outcome in outcomes:
            print(as_line(each, outcome))
    return status


def _publish(given: argparse.Namespace) -> int:
    if given.workers < 0:
        raise UserError(f"--workers needs 0 or more, got {given.workers}")
    if given.private and not given.push:
        raise UserError("--private has no effect without --push")
    if given.push:
        check_name(None, given.push)
    wanted = {key: getattr(given, key) for key in Publication.__dataclass_fields__ if key != "run"}
    folder, entry = publish(Publication(run=given.folder, **wanted))
    if given.push:
        check_name(tag_of(folder), given.push)
        print(push(folder, given.push, given.private))
    if entry.metrics is not None:
        print(f"top-1 {entry.metrics.top1:.2f} % on {entry.metrics.images:,} images")
    print(f"{folder}  {entry.size:,} bytes, sha256 {entry.sha256}")
    return 0


def _push(given: argparse.Namespace) -> int:
    check_name(tag_of(given.folder), given.repository)
    print(push(given.folder, given.repository, given.private))
    return 0

"""The three conditions of an optimal linear approximation to softmax attention, measured.

1. dynamic memory: the decay changes with the input, and by how much
2. static approximation: how near the attention map comes to a random softmax map, by state size
3. least parameters: what each function has, and whether there is a key besides query and decay

Source of the conditions, and of the claims beside them: MetaLA, arXiv 2411.10741, section 3 and
Table 2.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metala_vision.errors import UserError, nearest
from metala_vision.files import check_outputs, evenly_spread, write_text

from .conditions_rows import (
    INPUTS,
    MAX_IMAGES,
    NEAR,
    QUICK_SIZES,
    QUICK_STEPS,
    SHARES,
    SIDE,
    SIZES,
    STEPS,
    TARGETS,
    Dynamics,
    Fit,
    Row,
)
from .unified import between, read_marked

if TYPE_CHECKING:
    from torch import Tensor

    from .systems import System

MARK = "metala-vision probe conditions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; imports nothing of torch."""
    add = parser.add_argument
    add("--mixers", nargs="+", default=[], metavar="NAME", help="[all]")
    add("--model", nargs="+", default=[], metavar="MODEL",
        help="condition 1 of these too: folders that runs left, or timm names")  # fmt: skip
    add("--image", type=Path, nargs="+", default=[], metavar="PATH",
        help="files or folders: what --model sees [normal tokens into each layer]")  # fmt: skip
    add("--max-images", type=int, help=f"of all [{MAX_IMAGES}]")
    add("--steps", type=int, help=f"of each fit [{STEPS}]")
    add("--targets", type=int, help=f"random softmax maps [{TARGETS}]")
    add("--quick", action="store_true",
        help=f"{QUICK_STEPS} steps, one target, K = {QUICK_SIZES}")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="the tables as Markdown")
    add("--json", type=Path, metavar="FILE", help="all figures as JSON")
    add("--update", type=Path, metavar="FILE",
        help=f"put the tables between its marks <!-- {MARK} --> and <!-- end -->")  # fmt: skip


def run(given: argparse.Namespace) -> int:
    """Measure and tell; exit status 0.

    Raises:
        UserError: for what the user can mend, before any work where it can be seen before.
    """
    for flag in ("steps", "targets", "max_images"):
        name, value = flag.replace("_", "-"), getattr(given, flag)
        if value is not None and value < 1:
            raise UserError(f"--{name} needs 1 or more, got {value}")
        if value is not None and given.quick and flag != "max_images":
            raise UserError(f"--quick sets --{name}; give one of them")
    if given.image and not given.model:
        raise UserError("--image is what --model sees; name one")
    if given.max_images is not None and not given.image:
        raise UserError("--max-images is of --image; name one")
    outputs = {"--out": given.out, "--json": given.json, "--update": given.update}
    marked = read_marked(given.update, MARK) if given.update is not None else ""
    check_outputs(outputs, [(path, "--image") for path in given.image])
    from .conditions_table import as_markdown
    from .fit import MIXERS

    for i, name in enumerate(given.mixers):
        if name not in MIXERS:
            near = nearest(name, list(MIXERS))
            raise UserError(f"--mixers: {name!r} is none of {', '.join(MIXERS)}{near}")
        if name in given.mixers[:i]:
            raise UserError(f"--mixers: {name} is given twice")
    source = provenance(given)  # the code as it was when the work began
    most = given.max_images or MAX_IMAGES
    models = [model_dynamics(name, given.image, most) for name in given.model]
    names = given.mixers or list(MIXERS)
    if given.quick:
        rows = measure(names, QUICK_SIZES, QUICK_STEPS, 1)
    else:
        rows = measure(names, SIZES, given.steps or STEPS, given.targets or TARGETS)
    text = as_markdown(rows, models)
    print(text)
    if given.out is not None:
        write_text(given.out, f"{source}\n\n{text}\n")
    if given.json is not None:
        written = {
            "mixers": [dataclasses.asdict(row) for row in rows],
            "models": [dataclasses.asdict(own) for own in models],
        }
        write_text(given.json, json.dumps(written, indent=2) + "\n")
    if given.update is not None:
        write_text(given.update, between(marked, MARK, f"{source}\n\n{text}"))
    return 0


def provenance(given: argparse.Namespace) -> str:
    """The command and the commit of a block of a document."""
    from metala_vision.run_folder import code_version

    flags = [
        *(["--mixers", *given.mixers] if given.mixers else []),
        *(["--model", *given.model] if given.model else []),
        *(["--image ..."] if given.image else []),
        *(["--max-images", str(given.max_images)] if given.max_images is not None else []),
        *(["--steps", str(given.steps)] if given.steps is not None else []),
        *(["--targets", str(given.targets)] if given.targets is not None else []),
        *(["--quick"] if given.quick else []),
    ]
    return f"`{' '.join([MARK, *flags])}`, commit {code_version() or 'unknown'}."


def measure(names: Sequence[str], sizes: Sequence[int], steps: int, targets: int) -> list[Row]:
    """All three conditions of these mixers as they are registered, at the tiny size, seed 0."""
    from .fit import fit
    from .systems import classes, parameters, registered, tokens

    rows = []
    for system in registered("tiny", list(names)):
        maps = [[tokens(system.dim, SIDE, seed)] for seed in range(INPUTS)]
        fits = []
        for K in sizes:
            if sys.stderr.isatty():
                print(f"\r\x1b[K{system.name}, K = {K}", end="\r", file=sys.stderr, flush=True)
            own = fit(system.name, K, targets, steps)
            fits += [own] if own is not None else []
        has = classes(system)
        share = {name: count / system.dim**2 for name, count in parameters(system).items()}
        seen = dynamics(system.name, [system], maps)
        rows.append(Row(system.name, seen, fits, has, share, verdicts(has, fits, sizes)))
    return rows


def verdicts(
    has: tuple[bool, bool, bool], fits: Sequence[Fit], sizes: Sequence[int]
) -> tuple[bool, bool | None, bool | None]:
    """The three conditions: the decay changes with the input; with the largest state tried every
    target is near (None where it is not, and larger ones were not tried); and, of a mixer that
    meets these, no key besides query and decay (None for another mixer)."""
    from .fit import TOKENS

    near: bool | None = max(fits[-1].error) < NEAR if fits else None
    if near is False and max(sizes) < TOKENS:
        near = None
    return has[2], near, (not has[1]) if has[2] and near else None


def dynamics(
    name: str, systems: "Sequence[System]", maps: "Sequence[Sequence[Tensor]]"
) -> Dynamics:
    """Of systems, each with its maps [B, Gh, Gw, C], by inputs: maps[input][system]."""
    import torch

    from metala_vision.visualize.memory import quantiles

    changes, spreads, half_lives = False, [], []
    with torch.no_grad():
        for i, system in enumerate(systems):
            for passes in zip(*(system.forgetting(own[i]) for own in maps), strict=True):
                alpha = torch.cat([part.flatten(0, 1).flatten(1) for part in passes])
                log_decay = alpha.abs().log()  # [tokens of all inputs, channels]
                still = log_decay.amax(0) == log_decay.amin(0)
                changes |= not bool(still.all())
                spread = log_decay.std(0, unbiased=False) / log_decay.mean(0).abs()
                spreads.append(torch.where(still, 0.0, spread).mean())
                half_lives.append((math.log(2) / log_decay.abs()).flatten())
    lives = quantiles(torch.cat(half_lives), SHARES)
    return Dynamics(
        name,
        changes,
        torch.stack(spreads).mean().item(),
        [value if math.isfinite(value) else None for value in lives],
    )


def model_dynamics(name: str, images: Sequence[Path], most: int) -> Dynamics:
    """Of all layers of a trained model: over images that go through it, or over standard normal
    tokens into each layer.

    Raises:
        UserError: for a model that has no gated recurrence, and as load_model does.
    """
    from metala_vision.evaluate import load_model
    from metala_vision.visualize.command import image_files, read_images

    from .systems import systems_of, tokens

    files = image_files(images)
    model: Any = load_model(name).requires_grad_(False)
    systems = systems_of(name, model)
    if not systems:
        raise UserError(f"{name} has no gated recurrence, and so no decay")
    if not files:
        normal = [[tokens(own.dim, SIDE, seed) for own in systems] for seed in range(INPUTS)]
        return dynamics(name, systems, normal)
    chosen = evenly_spread(files, most)
    seen: list[list[Any]] = []
    for system in systems:
        system.mixer.register_forward_pre_hook(lambda _, inputs: seen[-1].append(inputs[0]))
    for image in read_images(chosen, getattr(model, "pretrained_cfg", {})):
        seen.append([])
        model(image.unsqueeze(0).double())
    return dynamics(name, systems, seen)

"""`metala-vision features MODEL`: kNN and linear probe on the frozen features of a data set."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metala_vision.config import DataConfig
from metala_vision.errors import UserError
from metala_vision.files import PICTURES, check_outputs, check_picture, replacing, write_text

if TYPE_CHECKING:
    from .extract import Part

# Of a configuration's data, what says which images, how they are split and read.
DATA_KEYS = (
    "dataset", "data_dir", "train_split", "val_split", "input_key", "target_key", "val_fraction",
    "val_file", "split_seed", "class_range", "batch_size", "workers", "max_unreadable",
)  # fmt: skip
NEIGHBOURS = (10, 20)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags beside those of the data; imports nothing of torch."""
    parser.add_argument("model", help="folder that a run left, or a timm model's name")
    parser.add_argument(
        "--random-init", action="store_true", help="with the weights before training, seed 0"
    )
    parser.add_argument(
        "--baseline", action="store_true", help="beside the same model with those weights"
    )
    parser.add_argument("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--k", nargs="+", type=int, default=NEIGHBOURS, metavar="K",
        help="neighbours that vote; the last is told at the end [10 20]",
    )  # fmt: skip
    parser.add_argument(
        "--no-probe", action="store_true",
        help="kNN alone: the probe takes long for many classes and channels",
    )  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="[auto]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures as JSON")
    parser.add_argument(
        "--npz", type=Path, metavar="FILE", help="features, labels and names of both parts, "
        "for numpy.load; of the model, not of its baseline",
    )  # fmt: skip
    parser.add_argument(
        "--picture", type=Path, metavar="FILE",
        help=f"held-out images with their nearest training images; {' '.join(PICTURES)}",
    )  # fmt: skip


def run(given: argparse.Namespace, config: DataConfig, model_kwargs: dict[str, Any]) -> int:
    """Print the figures, the headline last, and write what is asked for.

    Raises:
        UserError: for what the user can mend.
    """
    if min(given.k) < 1:
        raise UserError(f"--k needs 1 or more, got {min(given.k)}")
    if given.baseline and given.random_init:
        raise UserError("--baseline and --random-init are the same weights; drop one")
    if given.npz is not None and given.npz.suffix != ".npz":
        raise UserError(f"--npz must end in .npz, got {given.npz}")
    check_picture("--picture", given.picture)
    check_outputs({"--json": given.json, "--npz": given.npz, "--picture": given.picture})
    from metala_vision.processes import find_device
    from metala_vision.splits import find_split

    from .extract import create, extract

    device, split = find_device(given.device), find_split(config)
    if max(given.k) > len(split.train_indices):
        raise UserError(f"--k {max(given.k)}: there are {len(split.train_indices)} training images")
    figures: dict[str, Any] = {}
    for random_init in (True, False) if given.baseline else (given.random_init,):
        model = create(given.model, random_init, model_kwargs)
        said = {"say": lambda line: None} if figures else {}  # unreadable images, once
        train = extract(model, split.train, split.train_indices, config, device, "training", **said)
        val = extract(model, split.val, split.val_indices, config, device, "held-out", **said)
        if given.npz is not None and not (given.baseline and random_init):
            write_npz(given.npz, given.model, train, val)
        own = judge(train, val, split.num_classes, given, config.split_seed)
        print(as_lines(f"{given.model}{', before training' if random_init else ''}", own))
        figures = {
            "model": given.model, "random_init": random_init, "classes": split.num_classes, **own,
            **({"baseline": figures} if figures else {}),
        }  # fmt: skip
        if given.picture is not None and not (given.baseline and random_init):
            from .pictures import nearest

            nearest(train, val, f"{given.model}{', before training' * random_init}", given.picture)
    if given.json is not None:
        write_text(given.json, json.dumps(figures, indent=2) + "\n")
    print(headline(figures))
    return 0


def judge(
    train: "Part", val: "Part", classes: int, given: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """The figures of one model, for JSON; percentages."""
    from .judge import TEMPERATURE, accuracy, linear_probe, neighbours, vote

    ks = [k for k in given.k if k <= len(train.labels)]
    if not ks:
        raise UserError(f"--k {min(given.k)}: {len(train.labels)} training images can be read")
    similarities, indices = neighbours(train.features, val.features, max(ks))
    knn = []
    for k in ks:
        guesses = vote(similarities[:, :k], train.labels[indices[:, :k]], classes)
        top1, top5 = accuracy(guesses, val.labels)
        knn.append({"k": k, "temperature": TEMPERATURE, "top1": top1, "top5": top5})
    figures: dict[str, Any] = {
        "train_images": len(train.labels), "val_images": len(val.labels),
        "unreadable": train.unreadable + val.unreadable, "channels": train.features.shape[1],
        "knn": knn,
    }  # fmt: skip
    if not given.no_probe:
        probe = linear_probe(train.features, train.labels, val.features, seed)
        top1, top5 = accuracy(probe.guesses, val.labels)
        figures["probe"] = {
            "top1": top1, "top5": top5, "C": probe.C, "iterations": probe.iterations,
            "converged": probe.converged, "C_at_edge_of_grid": probe.at_edge,
            "grid": [vars(trial) for trial in probe.trials],
        }  # fmt: skip
    return figures


def as_lines(name: str, figures: dict[str, Any]) -> str:
    """A line for each way to judge; of the probe, how its C was found and whether it converged."""
    unreadable = f", {figures['unreadable']} cannot be read" if figures["unreadable"] else ""
    lines = [
        f"{name}: {figures['channels']} channels, {figures['train_images']:,} training and "
        f"{figures['val_images']:,} held-out images{unreadable}"
    ]
    for knn in figures["knn"]:
        lines.append(
            f"  kNN, k {knn['k']:<4d}    top-1 {knn['top1']:6.2f} %  top-5 {knn['top5']:6.2f} %"
        )
    if "probe" in figures:
        probe = figures["probe"]
        from .judge import GRID, MAX_ITER

        chosen = "no class has images to choose with"
        if probe["grid"]:
            chosen = f"best of {len(GRID)} on a fifth of the training images"
        if probe["C_at_edge_of_grid"]:
            chosen += "; at the edge of the grid, one beyond may be better"
        ended = f"not converged in {MAX_ITER} iterations"
        if probe["converged"]:
            ended = f"converged in {probe['iterations']} iterations"
        lines += [
            f"  linear probe   top-1 {probe['top1']:6.2f} %  top-5 {probe['top5']:6.2f} %",
            f"    C {probe['C']:g} ({chosen}), {ended}",
        ]
        doubtful = [f"{trial['C']:g}" for trial in probe["grid"] if not trial["converged"]]
        if doubtful:
            of_grid = ", ".join(doubtful)
            lines.append(f"    not converged in {MAX_ITER} iterations: C {of_grid} of the choice")
    return "\n".join(lines)


def headline(figures: dict[str, Any]) -> str:
    """The last line."""

    def short(own: dict[str, Any]) -> str:
        probe = f", linear probe {own['probe']['top1']:.2f} %" if "probe" in own else ""
        return f"kNN {own['knn'][-1]['top1']:.2f} %{probe}"

    before = f" (before training {short(figures['baseline'])})" if "baseline" in figures else ""
    return (
        f"top-1 {short(figures)}{before} on {figures['val_images']:,} held-out images of "
        f"{figures['classes']} classes"
    )


def write_npz(path: Path, model: str, train: "Part", val: "Part") -> None:
    """train_ and val_ features [n, D] float32, labels [n] and names [n]; classes, model.

    No pickles: numpy.load(FILE, allow_pickle=False) reads all.
    """
    import numpy as np

    arrays: dict[str, Any] = {"classes": np.array(train.source.classes), "model": np.array(model)}
    for name, part in (("train", train), ("val", val)):
        arrays[f"{name}_features"] = part.features
        arrays[f"{name}_labels"] = part.labels
        arrays[f"{name}_names"] = np.array(part.names)
    with replacing(path) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, **arrays)

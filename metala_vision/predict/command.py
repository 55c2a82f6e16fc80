"""`metala-vision predict IMAGE...`: the likeliest classes of images."""

import argparse
import csv
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metala_vision.errors import UserError
from metala_vision.files import PICTURES, check_outputs, check_picture, write_text

if TYPE_CHECKING:
    from .classify import Prediction

DEFAULT_MODEL = "metala_nano"  # its weights ship with the package


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; imports nothing of torch."""
    parser.add_argument("image", nargs="+", metavar="IMAGE", help="a file, or a folder of images")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="CHECKPOINT",
        help=f"folder that a run left, or a timm model's name [{DEFAULT_MODEL}]",
    )  # fmt: skip
    parser.add_argument("--topk", type=int, default=5, metavar="N", help="classes an image [5]")
    parser.add_argument("--batch-size", type=int, default=32, help="[32]")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="[auto]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the predictions as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a line for each image and class")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE",
        help=f"the images and their classes; {' '.join(PICTURES)}",
    )  # fmt: skip


def run(given: argparse.Namespace) -> int:
    """Print the classes image by image, and write what is asked for.

    Returns:
        The exit status: 1 where some images cannot be read; each is named on stderr.
    Raises:
        UserError: for what the user can mend; where no image can be read.
    """
    if given.topk < 1 or given.batch_size < 1:
        raise UserError("--topk and --batch-size need 1 or more")
    check_picture("--picture", given.picture)
    from .images import find_images

    files = find_images(given.image)
    outputs = {"--json": given.json, "--csv": given.csv, "--picture": given.picture}
    check_outputs(outputs, [(path, "an image that is read") for path in files])
    from .classify import Classifier

    classifier = Classifier(given.model, given.device)
    errors: dict[Path, str] = {}

    def unreadable(path: Path, error: UserError) -> None:
        errors[path] = error.line
        print(error.line, file=sys.stderr)

    done: list[Prediction] = []
    for prediction in classifier.predict(files, given.topk, given.batch_size, unreadable):
        done.append(prediction)
        print(as_lines(prediction), flush=True)
    if not done:
        raise UserError(f"none of the images can be read: {len(errors)} of {len(errors)}")
    if given.json is not None:
        values = as_json(given.model, done, errors)
        write_text(given.json, json.dumps(values, indent=1) + "\n")
    if given.csv is not None:
        write_text(given.csv, as_csv(done))
    if given.picture is not None:
        from .pictures import MOST, predictions

        predictions(done, given.model, given.picture)
        if len(done) > MOST:
            print(f"{given.picture} shows {MOST} of {len(done)} images, evenly spread")
    if len(files) > 1:
        left_out = f", {len(errors)} cannot be read" if errors else ""
        print(f"{given.model}: {len(done)} images{left_out}")
    return 1 if errors else 0


def as_lines(prediction: "Prediction") -> str:
    """The image, and a line for each class: probability, name, and words where there are some."""
    from .images import printable

    lines = [printable(prediction.image)]
    for guess in prediction.guesses:
        words = f"  {guess.description}" if guess.description else ""
        lines.append(f"  {100 * guess.probability:6.2f} %  {guess.name}{words}")
    return "\n".join(lines)


def as_json(model: str, done: Sequence["Prediction"], errors: dict[Path, str]) -> dict[str, Any]:
    """For programs; probabilities from 0 to 1."""
    return {
        "model": model,
        "images": [
            {
                "image": str(prediction.image),
                "predictions": [dataclasses.asdict(guess) for guess in prediction.guesses],
            }
            for prediction in done
        ],
        "unreadable": [{"image": str(path), "error": line} for path, line in errors.items()],
    }


def as_csv(done: Sequence["Prediction"]) -> str:
    """image, rank from 1, label, name, description, probability."""
    from .images import printable

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "rank", "label", "name", "description", "probability"])
    for prediction in done:
        for rank, guess in enumerate(prediction.guesses, 1):
            table.writerow([
                printable(prediction.image), rank, guess.label, guess.name,
                guess.description or "", f"{guess.probability:.6f}",
            ])  # fmt: skip
    return text.getvalue()

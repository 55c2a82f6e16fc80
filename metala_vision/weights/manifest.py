"""The manifest of a weights folder: which tags it holds, and what their files are.

    {"format": 1, "weights": {"metala_nano.tiny_imagenet": {"file": ..., "sha256": ..., ...}}}

Nothing in it is believed before it is checked: names of files stay inside the folder, weights are
safetensors of the stated size and sha256.
"""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from typing_extensions import Self

from metala_vision.errors import WeightsError, one_line

MANIFEST_FILE = "manifest.json"
FORMAT = 1
LARGEST = 2**36  # bytes of a file of weights, 64 GiB
TAG = re.compile(r"[a-z0-9_]+\.[a-z0-9_]+")
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def _inside(name: str) -> str:
    parts = name.split("/")
    if not all(_PART.fullmatch(part) for part in parts) or len(name) > 200:
        raise ValueError(f"file {name[:80]!r} is not a plain path inside the folder")
    if PurePosixPath(name).suffix != ".safetensors":
        raise ValueError(f"file {name!r} is no .safetensors; nothing else is read")
    return name


class _Part(BaseModel):
    # Later versions may write more than this one knows.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Preprocessing(_Part):
    """What evaluation does to an image, in timm's words."""

    input_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
    crop_pct: Annotated[float, Field(gt=0, le=1)]
    crop_mode: Literal["center", "squash", "border"]
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _of_all_channels(self) -> Self:
        if not len(self.mean) == len(self.std) == self.input_size[0]:
            raise ValueError("mean and std need a value for each channel of input_size")
        return self


class Metrics(_Part):
    """On the held-out images, in percent: of the file itself, or of the run, as the card says."""

    top1: Annotated[float, Field(ge=0, le=100)]
    top5: Annotated[float, Field(ge=0, le=100)]
    images: PositiveInt


class Entry(_Part):
    """The weights of one tag.

    Attributes:
        file: path inside the folder, in sha256 and size (bytes) as stated.
        dataset, recipe: what they were trained on, by which configuration.
        license, terms: under which they may be used, in the Hub's words and in others.
        label_names: of the classifier's outputs, in order. label_descriptions: by name, for people.
    """

    file: Annotated[str, AfterValidator(_inside)]
    size: Annotated[int, Field(gt=0, le=LARGEST)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    dataset: str
    recipe: str
    license: str
    terms: str | None = None
    metrics: Metrics | None = None
    num_classes: Annotated[int, Field(gt=0, le=2**20)]
    preprocessing: Preprocessing
    label_names: tuple[str, ...] | None = None
    label_descriptions: dict[str, str] | None = None

    @model_validator(mode="after")
    def _a_name_for_each_class(self) -> Self:
        if self.label_names is not None and len(self.label_names) != self.num_classes:
            raise ValueError(f"{len(self.label_names)} label_names, {self.num_classes} classes")
        return self

    def pretrained_cfg(self) -> dict[str, Any]:
        """The same in timm's words."""
        return {
            **self.preprocessing.model_dump(),
            "num_classes": self.num_classes,
            "license": self.license,
            "label_names": self.label_names,
            "label_descriptions": self.label_descriptions,
        }


Tag = Annotated[str, Field(pattern=rf"^{TAG.pattern}$")]


class Manifest(_Part):
    """The tags of a folder, as MODEL.TAG, and what holds them."""

    format: Literal[1] = FORMAT
    weights: dict[Tag, Entry] = {}

    def tags(self, architecture: str) -> list[str]:
        """Of a model, in the manifest's order."""
        names = (name.split(".") for name in self.weights)
        return [tag for model, tag in names if model == architecture]


def parse_manifest(text: str | bytes, where: object) -> Manifest:
    """Raises WeightsError, with the first fault, naming `where`."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise WeightsError(f"{where} is no manifest of weights: {one_line(what)[:300]}") from error


def read_manifest(path: Path) -> Manifest:
    """Raises WeightsError where it cannot be read."""
    try:
        return parse_manifest(path.read_bytes(), path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error


def as_json(manifest: Manifest) -> str:
    """With short lists on one line, for people to read."""
    text = json.dumps(manifest.model_dump(mode="json", exclude_none=True), indent=1)
    return re.sub(r"\[\n\s*([^][{}]*?)\n\s*\]", _on_one_line, text) + "\n"


def _on_one_line(found: re.Match[str]) -> str:
    items = re.sub(r"\n\s*", " ", found[1])
    return f"[{items}]"

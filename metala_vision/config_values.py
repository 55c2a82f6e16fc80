"""What a value of a configuration may be."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat


def _range(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("a range needs 0 < low <= high")
    return pair


def _places(pair: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= pair[0] < pair[1] - 1:
        raise ValueError("a range of at least two classes needs 0 <= low < high - 1")
    return pair


def _channels(number: int) -> int:
    if number not in (1, 3):
        raise ValueError("1 (grey) and 3 (colour) are accepted")
    return number


def _dataset(name: str) -> str:
    if name not in DATASETS and not name.startswith("hfds/"):
        raise ValueError(f"{', '.join(DATASETS)} and hfds/NAME are accepted")
    return name


def _sides(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] < pair[1] <= 1:
        raise ValueError("a range of sides needs 0 < low < high <= 1")
    return pair


def _weights(values: Any) -> Any:
    """The command line's list of a single word is that word."""
    if values is None or values in ("balanced", ["balanced"]):
        return None if values is None else "balanced"
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ValueError("balanced, or a number for each class, is accepted") from error


DATASETS = (
    "folder", "tar", "wds", "hfds", "digits", "cifar10", "cifar100", "flowers102", "oxford_pets",
)  # fmt: skip
DatasetName = Annotated[str, AfterValidator(_dataset)]
Channels = Annotated[int, AfterValidator(_channels)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Range = Annotated[tuple[float, float], AfterValidator(_range)]
Places = Annotated[tuple[int, int], AfterValidator(_places)]
Sides = Annotated[tuple[float, float], AfterValidator(_sides)]
Weights = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
ClassWeights = Annotated[Literal["balanced"] | Weights | None, BeforeValidator(_weights)]
Probability = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
CropShare = Annotated[float, Field(gt=0, le=1)]

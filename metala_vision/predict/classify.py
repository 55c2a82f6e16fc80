"""The likeliest classes of images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from metala_vision.errors import UnreadableImage, UserError
from metala_vision.evaluate import evaluation_transform, load_model
from metala_vision.labels import labels_of
from metala_vision.processes import find_device

from .images import printable, read_image


@dataclass
class Guess:
    """A class that an image may be of. description: words for the name, where there are some."""

    label: int
    name: str
    description: str | None
    probability: float

    @property
    def words(self) -> str:
        """What people call it."""
        return self.description or self.name


@dataclass
class Prediction:
    """The likeliest classes of one image, the likeliest first."""

    image: Path
    guesses: list[Guess]


class Classifier:
    """A model with its evaluation preprocessing, and the names of its classes.

    Args:
        checkpoint: a folder that a run left, or a timm name. device: auto, cpu or cuda.
    Raises:
        UserError: a model that cannot be loaded, or has no classes; no such device.
    """

    def __init__(self, checkpoint: str, device: str = "auto") -> None:
        self.device = find_device(device)
        self.checkpoint = checkpoint
        model = load_model(checkpoint)
        self.names, self.descriptions = labels_of(model, checkpoint)
        if not self.names:
            raise UserError(f"{checkpoint} has no classifier: it names no class")
        size, self.transform = evaluation_transform(getattr(model, "pretrained_cfg", {}))
        self.mode = "RGB" if size[0] == 3 else "L"
        self.model = model.to(self.device)

    def predict(
        self, files: Sequence[Path], topk: int, batch_size: int,
        unreadable: Callable[[Path, UnreadableImage], object],
    ) -> Iterator[Prediction]:  # fmt: skip
        """In order, as they are done.

        Args:
            topk: classes of each image, as many as there are at most.
            unreadable: called for each image that is left out.
        """
        for start in range(0, len(files), batch_size):
            images, kept = [], []
            for path in files[start : start + batch_size]:
                try:
                    images.append(self.transform(read_image(path, self.mode)))
                    kept.append(path)
                except UnreadableImage as error:
                    unreadable(path, error)
            if not kept:
                continue
            best = self._probabilities(torch.stack(images)).topk(min(topk, len(self.names)))
            values, labels = best.values.tolist(), best.indices.tolist()
            for path, own_values, own_labels in zip(kept, values, labels, strict=True):
                guesses = [
                    Guess(label, self.names[label], self.descriptions.get(self.names[label]), value)
                    for label, value in zip(own_labels, own_values, strict=True)
                ]
                if guesses[0].probability != guesses[0].probability:
                    raise UserError(f"{self.checkpoint} answers nan to {printable(path)}")
                yield Prediction(path, guesses)

    @torch.inference_mode()
    def _probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, height, width] -> [B, classes], on the CPU."""
        try:
            return self.model(images.to(self.device)).float().softmax(1).cpu()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory with --batch-size {len(images)}; a smaller one needs less"
            ) from error

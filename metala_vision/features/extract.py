"""Frozen features of images: what a model's classifier sees, without augmentation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from metala_vision.config import DataConfig
from metala_vision.data import ImageData, Unreadable
from metala_vision.errors import WORKER_ERRORS, UserError, worker_died
from metala_vision.evaluate import evaluation_transform, load_model
from metala_vision.sources import Source


@dataclass
class Part:
    """The images of one part that can be read.

    features: [n, D], float32. labels: [n]. indices: of the images in their source, n of them.
    unreadable: how many are left out.
    """

    source: Source
    features: np.ndarray
    labels: np.ndarray
    indices: list[int]
    unreadable: int

    @property
    def names(self) -> list[str]:
        return [self.source.name(i) for i in self.indices]


def create(checkpoint: str, random_init: bool, kwargs: dict[str, Any]) -> nn.Module:
    """A run's folder, or any timm name; with random_init, as before any training, seed 0."""
    refused = {"in_chans", "img_size", "device", "dtype"} & set(kwargs)
    if refused:
        raise UserError(f"--model-kwargs takes no {min(refused)}: images are as in training")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load_model(checkpoint, pretrained=not random_init, **kwargs)
    if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
        raise UserError(f"{checkpoint} does not tell its features apart from its classifier")
    return model


@torch.inference_mode()
def extract(
    model: nn.Module, source: Source, indices: Sequence[int], config: DataConfig,
    device: torch.device, what: str, say: Callable[[str], object] = print,
) -> Part:  # fmt: skip
    """Pooled features before the classifier: forward_head(forward_features(x), pre_logits=True).

    Args:
        what: "training" or "held-out".
        say: called with the line that names an unreadable image.
    Raises:
        UserError: more unreadable images than config.max_unreadable, none that can be read,
            features that are not [B, D] or not finite.
    """
    size, transform = evaluation_transform(getattr(model, "pretrained_cfg", {}))
    data = ImageData(source, indices, "RGB" if size[0] == 3 else "L", transform, size)
    loader = DataLoader(data, batch_size=config.batch_size, num_workers=config.workers)
    own: Any = model.to(device)
    features, labels = [], []
    try:
        for images, target in loader:
            found = own.forward_head(own.forward_features(images.to(device)), pre_logits=True)
            if not isinstance(found, torch.Tensor) or found.ndim != 2:
                raise UserError("the model gives no pooled features, [images, channels]")
            features.append(found.float().cpu())
            labels.append(target)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with --batch-size {config.batch_size}; a smaller one needs less"
        ) from error
    except WORKER_ERRORS as error:
        raise worker_died(error) or error from error
    values, label = torch.cat(features).numpy(), torch.cat(labels).numpy()
    missing = Unreadable(source, indices, what, config.max_unreadable, say)
    missing([-1 - int(position) for position in label[label < 0]])
    kept = label >= 0
    if not kept.any():
        raise UserError(f"none of the {what} images can be read")
    if not np.isfinite(values[kept]).all():
        raise UserError("features of the model are infinite or nan")
    left = [indices[i] for i in np.flatnonzero(kept)]
    return Part(source, values[kept], label[kept], left, len(missing.positions))

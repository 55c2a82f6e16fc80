"""The parts of a recipe between a batch and its loss: mixing, criterion, averaging, a teacher."""

from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .config import DataConfig, ModelConfig, OptimConfig
from .errors import UserError, nearest, one_line
from .sampling import MIXING, seeded, stream


class Mixing:
    """Mixup and CutMix by timm, drawn from (seed, epoch, place of the batch in its epoch).

    With mode "batch" all processes mix alike, as one process would the whole batch; with "pair" and
    "elem" each draws for itself.

    Labels become distributions; from `mixup_off_epoch` on they are smoothed, and images left alone.
    """

    def __init__(self, config: DataConfig, smoothing: float, num_classes: int, seed: int) -> None:
        self.seed = seed
        self.off_epoch = config.mixup_off_epoch
        self.mix = Mixup(
            mixup_alpha=config.mixup, cutmix_alpha=config.cutmix,
            cutmix_minmax=list(config.cutmix_minmax) if config.cutmix_minmax else None,
            prob=config.mixup_prob, switch_prob=config.mixup_switch_prob, mode=config.mixup_mode,
            label_smoothing=smoothing, num_classes=num_classes,
        )  # fmt: skip

    def __call__(
        self, batch: Tensor, target: Tensor, epoch: int, place: int, rank: int = 0
    ) -> tuple[Any, Any]:
        """place: of the batch in its epoch, counted from 0 as epochs are. rank: of the process."""
        where = (epoch, place) if self.mix.mode == "batch" or rank == 0 else (epoch, place, rank)
        self.mix.mixup_enabled = self.off_epoch is None or epoch < self.off_epoch
        with seeded(stream(self.seed, MIXING, *where)):
            return self.mix(batch, target)


def create_mixing(
    config: DataConfig, optim: OptimConfig, num_classes: int, seed: int, images: int
) -> Mixing | None:
    """None where the configuration mixes nothing. images: of a batch."""
    if config.mixup == 0 and config.cutmix == 0 and config.cutmix_minmax is None:
        return None
    if images % 2:
        raise UserError(f"mixup and cutmix take batches in pairs, a batch has {images} images")
    return Mixing(config, optim.smoothing, num_classes, seed)


class WeightedCrossEntropy(nn.Module):
    """Cross entropy of labels, or of distributions, each class with its weight.

        loss = 1/B sum_i sum_c w_c t_ic (-log p_ic)

    Over the number of images, not the sum of their weights, which differs from batch to batch.

    Args:
        weights: w [classes].
        smoothing: e, of labels: t = (1 - e) onehot + e / classes.
    """

    def __init__(self, weights: Tensor, smoothing: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.Buffer(weights)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        weights = self.weights.to(logits)
        smoothing = 0.0 if target.is_floating_point() else self.smoothing
        loss = F.cross_entropy(
            logits, target, weights, label_smoothing=smoothing, reduction="sum"
        )  # fmt: skip
        return loss / len(logits)


def weigh_classes(optim: OptimConfig, counts: np.ndarray) -> Tensor | None:
    """The weight of each class in the loss; None where there are none.

    "balanced" is n / (classes n_c), with which the mean over the images is 1.

    Args:
        counts: n_c, of the training images.
    Raises:
        UserError: for another number of weights than of classes, and beside bce_loss.
    """
    given = optim.class_weights
    if given is None:
        return None
    if optim.bce_loss:
        raise UserError(f"optim.class_weights={given}: not with bce_loss, whose classes are alone")
    if given == "balanced":
        present = np.count_nonzero(counts)
        given = [counts.sum() / (present * count) if count else 0.0 for count in counts]
    if len(given) != len(counts):
        raise UserError(
            f"optim.class_weights has {len(given)} numbers for {len(counts)} outputs of the model"
        )
    return torch.tensor(given, dtype=torch.float32)


def create_criterion(
    optim: OptimConfig, mixed: bool, class_weights: Tensor | None = None
) -> nn.Module:
    """Cross entropy, or a binary one for each class; of distributions where images are mixed."""
    if class_weights is not None:
        return WeightedCrossEntropy(class_weights, 0.0 if mixed else optim.smoothing)
    if optim.bce_loss:
        # Mixed labels are smoothed already.
        smoothing = 0.0 if mixed else optim.smoothing
        return BinaryCrossEntropy(smoothing=smoothing, target_threshold=optim.bce_target_thresh)
    return SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(optim.smoothing)


def create_ema(model: nn.Module, optim: OptimConfig) -> ModelEmaV3 | None:
    """The moving average of the weights, or None.

    It begins as the weights after the first step. With warm-up the decay at step n is 1 - n^(-2/3),
    up to model_ema_decay: an average over a share of the steps so far, where a constant one would
    keep that beginning for 1 / (1 - decay) steps.
    """
    if not optim.model_ema:
        return None
    return ModelEmaV3(model, decay=optim.model_ema_decay, use_warmup=optim.model_ema_warmup)


class Teacher(nn.Module):
    """A timm model whose answer the student's loss takes into account.

        soft: (1 - share) loss + share T^2 KL(softmax(teacher / T) || softmax(student / T))
        hard: (1 - share) loss + share cross_entropy(student, argmax teacher)

    Source: arXiv 1503.02531, section 2; hard as in DeiT, arXiv 2012.12877, section 4, without its
    distillation token.

    Args:
        model: in evaluation mode, without gradients.
        config: share, kind and temperature.
        mean, std: of the student's images [in_chans]; the teacher gets its own.
    """

    def __init__(
        self, model: nn.Module, config: OptimConfig, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.kind, self.share = config.distill_type, config.distill_share
        self.temperature = config.distill_temperature
        own = resolve_data_config({}, model=model)
        mean_, std_, own_mean, own_std = (
            torch.tensor(values[: len(mean)], dtype=torch.float64).view(-1, 1, 1)
            for values in (mean, std, own["mean"], own["std"])
        )
        # (x std + mean - own mean) / own std
        self.factor = nn.Buffer((std_ / own_std).float())
        self.shift = nn.Buffer(((mean_ - own_mean) / own_std).float())

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, loss: Tensor, logits: Tensor, batch: Tensor) -> Tensor:
        """The loss with the teacher's part."""
        with torch.no_grad():
            taught = self.model(batch * self.factor + self.shift).float()
        logits = logits.float()
        if self.kind == "hard":
            part = F.cross_entropy(logits, taught.argmax(1))
        else:
            T = self.temperature
            part = T**2 * F.kl_div(
                (logits / T).log_softmax(1), (taught / T).log_softmax(1),
                reduction="batchmean", log_target=True,
            )  # fmt: skip
        return (1 - self.share) * loss + self.share * part


def create_teacher(
    optim: OptimConfig, model: ModelConfig, num_classes: int, preprocessing: dict[str, Any]
) -> Teacher | None:
    """The configured teacher, or None; a mistake in its name or weights is a UserError."""
    name = optim.distill_teacher
    if name is None:
        return None
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(name):
        raise UserError(
            f"unknown teacher optim.distill_teacher={name!r}{nearest(name, timm.list_models())}"
        )
    given: dict[str, Any] = {"pretrained": True, "in_chans": model.in_chans, **optim.distill_kwargs}
    try:
        try:
            teacher = timm.create_model(name, **{"img_size": model.img_size, **given})
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            teacher = timm.create_model(name, **given)  # a CNN: takes any size
        teacher.eval()
        with torch.no_grad():
            classes = teacher(torch.zeros(1, *preprocessing["input_size"])).shape[-1]
    except Exception as error:  # whatever loading weights may raise
        reason = one_line(error) or type(error).__name__
        raise UserError(f"cannot build the teacher {name}: {reason}") from error
    if classes != num_classes:
        raise UserError(f"the teacher {name} knows {classes} classes, the student {num_classes}")
    return Teacher(teacher, optim, preprocessing["mean"], preprocessing["std"])


def compile_model(model: nn.Module, config: ModelConfig) -> None:
    """torch.compile in place, the whole model or each of its blocks; names stay as they are."""
    if config.torchcompile == "model":
        model.compile()
    elif config.torchcompile == "blocks":
        blocks: Any = getattr(model, "blocks", None)
        if blocks is None:
            raise UserError(
                f"model.torchcompile='blocks': {config.model} has no blocks; take 'model'"
            )
        for block in blocks:
            block.compile()

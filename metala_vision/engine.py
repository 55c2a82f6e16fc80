"""One epoch of training, one pass of evaluation."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader

from .errors import UserError


@dataclass
class Interval:
    """What happened since the last report: written to the log, shown on the bar."""

    step: int
    epoch: float
    loss: float
    lr: float
    img_per_s: float


@dataclass
class Evaluation:
    """Accuracy in percent and mean cross entropy over the held-out images."""

    top1: float
    top5: float
    loss: float
    images: int


@dataclass
class Training:
    """What an epoch of training works with; `step` counts the optimizer steps of the whole run."""

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: CosineLRScheduler
    accelerator: Accelerator
    last_step: int
    clip_grad: float | None = None
    log_interval: int = 10
    step: int = 0


def train_epoch(
    run: Training,
    loader: DataLoader,
    on_images: Callable[[int], object] = lambda images: None,
    on_interval: Callable[[Interval], object] = lambda interval: None,
) -> None:
    """Train until the loader or `run.last_step` ends.

    Args:
        on_images: called after each step with the number of images seen in it.
        on_interval: called every `run.log_interval` steps and at the end.
    Raises:
        UserError: where the loss of an interval, or a weight at the end, is not finite.
    """
    model, optimizer, accelerator = run.model, run.optimizer, run.accelerator
    model.train()
    start = run.step
    loss_sum = torch.zeros((), device=accelerator.device)
    since_step, since_time, images = start, time.perf_counter(), 0
    for batch, target in loader:
        run.scheduler.step_update(run.step)
        optimizer.zero_grad()
        loss = run.criterion(model(batch), target)
        accelerator.backward(loss)
        if run.clip_grad is not None:
            accelerator.clip_grad_norm_(model.parameters(), run.clip_grad)
        optimizer.step()
        run.step += 1
        images += len(target)
        on_images(len(target))
        loss_sum += loss.detach()
        ends = run.step == run.last_step or run.step - start == len(loader)
        if ends or (run.step - start) % run.log_interval == 0:
            mean_loss = loss_sum.item() / (run.step - since_step)
            lr = optimizer.param_groups[0]["lr"]
            if not math.isfinite(mean_loss) or (ends and not has_finite_weights(model)):
                what = (
                    f"loss became {mean_loss}"
                    if not math.isfinite(mean_loss)
                    else ("weights became infinite or nan")
                )
                raise UserError(
                    f"the {what} between steps {since_step + 1} and {run.step} "
                    f"(learning rate {lr:.3g}); a lower lr, clip_grad or another mixed_precision "
                    "may help"
                )
            rate = images / (time.perf_counter() - since_time)
            on_interval(Interval(run.step, run.step / len(loader), mean_loss, lr, rate))
            loss_sum.zero_()
            since_step, since_time, images = run.step, time.perf_counter(), 0
        if ends:
            break


def has_finite_weights(model: nn.Module) -> bool:
    """Whether no parameter holds an infinity or a NaN."""
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> Evaluation:
    """Top-1, top-5 (top-n for n < 5 classes) and loss, each held-out image counted once.

    Raises:
        UserError: where the loss is not finite.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch, target in loader:
        logits = model(batch).float()
        loss = nn.functional.cross_entropy(logits, target, reduction="none")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == target[:, None]
        per_image = torch.stack([hits[:, 0], hits.any(1), loss, torch.ones_like(loss)], 1)
        gathered: Any = accelerator.gather_for_metrics(per_image)
        sums += gathered.cpu().double().sum(0)
    top1, top5, loss_sum, images = sums.tolist()
    if not math.isfinite(loss_sum):
        raise UserError(f"the loss of the evaluation is {loss_sum}")
    return Evaluation(100 * top1 / images, 100 * top5 / images, loss_sum / images, int(images))

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

from .config import OptimConfig
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


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: CosineLRScheduler,
    accelerator: Accelerator,
    config: OptimConfig,
    start_step: int,
    last_step: int,
    log_interval: int,
    on_images: Callable[[int], object],
    on_interval: Callable[[Interval], None],
) -> int:
    """Train from `start_step` until the loader or `last_step` ends; the number of the next step.

    Args:
        on_images: called after each step with the images that all processes saw in it.
        on_interval: called every `log_interval` steps and at the end.
    Raises:
        UserError: where the loss of an interval is not finite.
    """
    model.train()
    step = start_step
    loss_sum = torch.zeros((), device=accelerator.device)
    since_step, since_time, images = step, time.perf_counter(), 0
    for batch, target in loader:
        scheduler.step_update(step)
        optimizer.zero_grad()
        loss = criterion(model(batch), target)
        accelerator.backward(loss)
        if config.clip_grad is not None:
            accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        step += 1
        seen = len(target) * accelerator.num_processes
        images += seen
        on_images(seen)
        loss_sum += loss.detach()
        ends = step == last_step or step - start_step == len(loader)
        if ends or (step - start_step) % log_interval == 0:
            reduced: Any = accelerator.reduce(loss_sum, "mean")
            mean_loss = reduced.item() / (step - since_step)
            lr = optimizer.param_groups[0]["lr"]
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"the loss became {mean_loss} between steps {since_step + 1} and {step} "
                    f"(learning rate {lr:.3g}); a lower lr, clip_grad or another mixed_precision "
                    "may help"
                )
            elapsed = time.perf_counter() - since_time
            epoch = step / len(loader)
            on_interval(Interval(step, epoch, mean_loss, lr, images / elapsed))
            loss_sum.zero_()
            since_step, since_time, images = step, time.perf_counter(), 0
        if ends:
            break
    return step


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> Evaluation:
    """Top-1, top-5 (top-n for n < 5 classes) and loss, each held-out image counted once."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch, target in loader:
        logits = model(batch).float()
        loss = nn.functional.cross_entropy(logits, target, reduction="none")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == target[:, None]
        per_image = torch.stack([hits[:, 0], hits.any(1), loss, torch.ones_like(loss)], 1)
        gathered: Any = accelerator.gather_for_metrics(per_image)
        sums += gathered.double().sum(0).cpu()
    top1, top5, loss_sum, images = sums.tolist()
    return Evaluation(100 * top1 / images, 100 * top5 / images, loss_sum / images, int(images))

"""One epoch of training, one pass of evaluation."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .errors import UserError
from .recipe import Mixing, Teacher


@dataclass
class Interval:
    """What happened since the last report: written to the log, shown on the bar."""

    step: int
    epoch: float
    loss: float
    lr: float
    img_per_s: float
    waited: float
    """Share of the time that the loop waited for the loader."""
    memory_mib: float
    """Largest so far: allocated on a GPU, else of this process (without its workers)."""


@dataclass
class Evaluation:
    """Accuracy in percent and mean cross entropy over the held-out images that can be read."""

    top1: float
    top5: float
    loss: float
    images: int
    unreadable: int = 0


@dataclass
class Training:
    """What an epoch of training works with; `step` counts the optimizer steps of the whole run."""

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    accelerator: Accelerator
    last_step: int
    clip_grad: float | None = None
    log_interval: int = 10
    grad_accum_steps: int = 1
    mixing: Mixing | None = None
    teacher: Teacher | None = None
    ema: ModelEmaV3 | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    step: int = 0

    def loss(self, batch: Tensor, target: Tensor, epoch: int, place: int) -> Tensor:
        """Of one batch, the epoch's `place`-th."""
        batch = batch.to(self.accelerator.device, non_blocking=True)
        batch = batch.to(memory_format=self.memory_format)
        target = target.to(self.accelerator.device, non_blocking=True)
        if self.mixing is not None:
            batch, target = self.mixing(batch, target, epoch, place)
        logits = self.model(batch)
        loss = self.criterion(logits, target)
        if self.teacher is not None:
            with self.accelerator.autocast():
                loss = self.teacher(loss, logits, batch)
        return loss


def steps_of(batches: int, grad_accum_steps: int) -> int:
    """Optimizer steps of an epoch."""
    return math.ceil(batches / grad_accum_steps)


def train_epoch(
    run: Training,
    loader: DataLoader,
    epoch: int = 0,
    on_images: Callable[[int], object] = lambda images: None,
    on_interval: Callable[[Interval], object] = lambda interval: None,
    on_unreadable: Callable[[int], object] = lambda position: None,
) -> None:
    """Train until the loader or `run.last_step` ends.

    The loss of a step is the mean over its batches, also of the fewer that the last one may have.

    Args:
        loader: of (images, labels) or (images, labels, positions of images replaced).
        epoch: counted from 0.
        on_images: called after each batch with the number of images seen in it.
        on_interval: called every `run.log_interval` steps and at the end.
        on_unreadable: called with the position of each image that could not be read.
    Raises:
        UserError: where the loss of an interval, or a weight at the end, is not finite.
    """
    model, optimizer, accelerator = run.model, run.optimizer, run.accelerator
    model.train()
    start, batches = run.step, len(loader)
    steps = steps_of(batches, run.grad_accum_steps)
    loss_sum = torch.zeros((), device=accelerator.device)
    since_step, since_time, images, waited = start, time.perf_counter(), 0, 0.0
    draws = iter(loader)
    for place in range(batches):
        asked = time.perf_counter()
        batch, target, *unreadable = next(draws)
        waited += time.perf_counter() - asked
        for positions in unreadable:
            for position in positions[positions >= 0].tolist():
                on_unreadable(position)
        in_window = place % run.grad_accum_steps
        window = min(run.grad_accum_steps, batches - (place - in_window))
        if in_window == 0:
            run.scheduler.step_update(run.step)
            optimizer.zero_grad()
        completes = in_window == window - 1
        with contextlib.nullcontext() if completes else accelerator.no_sync(model):
            loss = run.loss(batch, target, epoch, place) / window
            accelerator.backward(loss)
        loss_sum += loss.detach()
        images += len(target)
        on_images(len(target))
        if not completes:
            continue
        if run.clip_grad is not None:
            accelerator.clip_grad_norm_(model.parameters(), run.clip_grad)
        optimizer.step()
        run.step += 1
        if run.ema is not None:
            run.ema.update(accelerator.unwrap_model(model), step=run.step)
        ends = run.step == run.last_step or run.step - start == steps
        if ends or (run.step - start) % run.log_interval == 0:
            mean_loss = loss_sum.item() / (run.step - since_step)
            lr = max(group["lr"] for group in optimizer.param_groups)
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
            seconds = time.perf_counter() - since_time
            on_interval(
                Interval(
                    run.step, run.step / steps, mean_loss, lr, images / seconds, waited / seconds,
                    memory_mib(accelerator.device),
                )
            )  # fmt: skip
            loss_sum.zero_()
            since_step, since_time, images, waited = run.step, time.perf_counter(), 0, 0.0
        if ends:
            break


def memory_mib(device: torch.device) -> float:
    """The most memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def has_finite_weights(model: nn.Module) -> bool:
    """Whether no parameter holds an infinity or a NaN."""
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    on_unreadable: Callable[[int], object] = lambda position: None,
) -> Evaluation:
    """Top-1, top-5 (top-n for n < 5 classes) and loss, each held-out image counted once; those that
    cannot be read (label -1 - position) are left out, named and counted.

    Raises:
        UserError: where the loss is not finite.
    """
    model.eval()
    sums, unreadable = torch.zeros(5, dtype=torch.float64), 0
    for batch, target in loader:
        logits = model(batch).float()
        read = target >= 0
        loss = F.cross_entropy(logits, target.clamp_min(0), reduction="none")
        loss = torch.where(read, loss, 0.0)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == target[:, None]
        per_image = torch.stack(
            [x.double() for x in (hits[:, 0], hits.any(1), loss, read, target)], 1
        )
        gathered: Any = accelerator.gather_for_metrics(per_image)
        for label in gathered[gathered[:, 4] < 0, 4].tolist():
            on_unreadable(-1 - int(label))
            unreadable += 1
        sums += gathered.cpu().double().sum(0)
    top1, top5, loss_sum, images, _ = sums.tolist()
    if not images:
        raise UserError(f"none of the {unreadable} images of the evaluation can be read")
    if not math.isfinite(loss_sum):
        raise UserError(f"the loss of the evaluation is {loss_sum}")
    accuracy = [100 * hits / images for hits in (top1, top5)]
    return Evaluation(accuracy[0], accuracy[1], loss_sum / images, int(images), unreadable)

"""One epoch of training, one pass of evaluation, on one process or many."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .errors import UserError
from .processes import gathered, largest
from .recipe import Mixing, Teacher
from .sampling import Loader


@dataclass
class Interval:
    """What happened since the last report: written to the log, shown on the bar."""

    step: int
    epoch: float
    loss: float
    """Mean over the steps whose loss was finite, and over the processes."""
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
class Skipped:
    """A step whose loss or gradient was not finite; it left the weights as they were."""

    step: int
    epoch: int
    batches: range
    """Of the epoch, that the step was made of."""
    loss: float
    """Of this process."""
    in_a_row: int


def _ignore(*_: Any) -> None: ...


@dataclass
class Hooks:
    """What a caller of train_epoch is told, and asked."""

    images: Callable[[int], object] = _ignore
    """Number of images of each batch, over all processes."""
    interval: Callable[[Interval], object] = _ignore
    unreadable: Callable[[list[int]], object] = _ignore
    """Positions of images that could not be read, with each interval."""
    skipped: Callable[[Skipped], object] = _ignore
    asked: Callable[[], tuple[int, bool]] = lambda: (0, False)
    """Before each step is taken: the number of a signal that ends the run, or 0, and whether to
    save. What one process says holds for all."""
    save: Callable[[], object] = _ignore
    """Behind a step for which that was asked."""
    stop: Callable[[int], object] = _ignore
    """Behind it, with the signal's number."""


@dataclass
class Training:
    """What an epoch of training works with, and where the run stands."""

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
    frozen: list[nn.Module] = field(default_factory=list)
    """Parts of the model that are not trained."""
    lora_scale: float | None = None
    """Of transfer.add_lora, where the model has adapters."""
    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    """Of the next batch, counted from 0."""
    place: int = 0
    """Of the next batch in its epoch."""
    loss_sum: float = 0.0
    """Of this process, over the steps since the last interval."""
    finite_steps: int = 0
    """Since the last interval."""
    in_a_row: int = 0
    """Steps skipped one after the other."""
    unreadable: list[int] = field(default_factory=list)
    """Positions found by this process since the last interval."""

    def loss(self, batch: Tensor, target: Tensor) -> Tensor:
        """Of one batch."""
        batch = batch.to(self.accelerator.device, non_blocking=True)
        batch = batch.to(memory_format=self.memory_format)
        target = target.to(self.accelerator.device, non_blocking=True)
        if self.mixing is not None:
            batch, target = self.mixing(
                batch, target, self.epoch, self.place, self.accelerator.process_index
            )
        logits = self.model(batch)
        loss = self.criterion(logits, target)
        if self.teacher is not None:
            with self.accelerator.autocast():
                loss = self.teacher(loss, logits, batch)
        return loss

    def take_step(self, loss: Tensor, asked: tuple[int, bool]) -> tuple[bool, int, bool]:
        """Step, unless the loss or the gradient of a process is not finite.

        Args:
            loss: of the step, on this process. asked: as of Hooks.
        Returns:
            Whether all were finite, and `asked` over all processes.
        """
        accelerator, optimizer = self.accelerator, self.optimizer
        numbers = [loss]
        norm: Any = None
        if self.clip_grad is not None:
            norm = accelerator.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        elif accelerator.scaler is None:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        # The scaler of fp16 is calibrated by gradients that overflow: those are no fault.
        if norm is not None and accelerator.scaler is None:
            numbers.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        fault = (~torch.stack([x.float() for x in numbers]).isfinite()).float().amax()
        if accelerator.num_processes == 1:
            finite, (signal, save) = not fault.item(), asked
        else:
            said = torch.tensor([float(x) for x in asked], device=accelerator.device)
            bad, signal, save = largest(torch.cat([fault[None], said]))
            finite = not bad
        # Where there is a scaler it skips the step itself, and must be told of it.
        stepped = finite or accelerator.scaler is not None
        if stepped:
            optimizer.step()
        self.step += 1
        if finite and self.ema is not None and not accelerator.optimizer_step_was_skipped:
            self.ema.update(accelerator.unwrap_model(self.model), step=self.step)
        return finite, int(signal), bool(save)


def steps_of(batches: int, grad_accum_steps: int) -> int:
    """Optimizer steps of an epoch."""
    return math.ceil(batches / grad_accum_steps)


def train_epoch(run: Training, loader: Loader, hooks: Hooks | None = None) -> None:
    """Train from `run.place` until the epoch or `run.last_step` ends.

    The loss of a step is the mean over its batches, also of the fewer that the last one may have.

    Args:
        loader: of (images, labels) or (images, labels, positions of images replaced), from batch
            `run.place` on; its length is that of the whole epoch.
    Raises:
        UserError: where a weight at the end is not finite.
    """
    hooks = hooks or Hooks()
    model, optimizer, accelerator = run.model, run.optimizer, run.accelerator
    model.train()
    for part in run.frozen:
        part.eval()
    batches, accum = len(loader), run.grad_accum_steps
    steps = steps_of(batches, accum)
    first_step = run.step - run.place // accum
    loss_sum = torch.tensor(run.loss_sum, device=accelerator.device)
    window_loss = torch.zeros((), device=accelerator.device)
    since_time, images, waited = time.perf_counter(), 0, 0.0
    draws = iter(loader)
    for place in range(run.place, batches):
        asked = time.perf_counter()
        batch, target, *unreadable = next(draws)
        waited += time.perf_counter() - asked
        for positions in unreadable:
            run.unreadable += positions[positions >= 0].tolist()
        in_window = place % accum
        window = min(accum, batches - (place - in_window))
        if in_window == 0:
            run.scheduler.step_update(run.step)
            optimizer.zero_grad()
            window_loss.zero_()
        completes = in_window == window - 1
        with contextlib.nullcontext() if completes else accelerator.no_sync(model):
            loss = run.loss(batch, target) / window
            accelerator.backward(loss)
        window_loss += loss.detach()
        images += len(target) * accelerator.num_processes
        hooks.images(len(target) * accelerator.num_processes)
        run.place += 1
        if not completes:
            continue
        finite, signal, save = run.take_step(window_loss, hooks.asked())
        if finite:
            loss_sum += window_loss
            run.finite_steps += 1
            run.in_a_row = 0
        else:
            run.in_a_row += 1
            window = range(place - in_window, place + 1)
            hooks.skipped(Skipped(run.step, run.epoch, window, window_loss.item(), run.in_a_row))
        ends = run.step == run.last_step or run.place == batches
        if ends or (run.step - first_step) % run.log_interval == 0:
            if ends and not all_finite(model, accelerator):
                raise UserError(f"weights became infinite or nan by step {run.step}")
            if run.finite_steps:
                mean_loss: Any = accelerator.reduce(loss_sum.clone(), "mean")
                lr = max(group["lr"] for group in optimizer.param_groups)
                seconds = time.perf_counter() - since_time
                hooks.interval(
                    Interval(
                        run.step, run.step / steps, mean_loss.item() / run.finite_steps, lr,
                        images / seconds, waited / seconds, memory_mib(accelerator.device),
                    )
                )  # fmt: skip
            found = gathered(accelerator, run.unreadable)
            run.unreadable = []
            hooks.unreadable(found)
            loss_sum.zero_()
            run.finite_steps = 0
            since_time, images, waited = time.perf_counter(), 0, 0.0
        if run.place == batches:
            run.epoch, run.place = run.epoch + 1, 0
        if save or signal:
            run.loss_sum = loss_sum.item()
            hooks.save()
        if signal:
            hooks.stop(signal)
        if ends:
            break
    run.loss_sum = 0.0


def memory_mib(device: torch.device) -> float:
    """The most memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def all_finite(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether no parameter and no statistic, over all processes, holds an infinity or a NaN."""
    parts: list[Any] = [*model.parameters(), *model.buffers()]
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in parts]
    finite = torch.stack([p.isfinite().all() for p in parts]).all()
    if accelerator.num_processes == 1:
        return bool(finite)
    return not largest((~finite).float()[None])[0]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    on_unreadable: Callable[[list[int]], object] = _ignore,
) -> Evaluation:
    """Top-1, top-5 (top-n for n < 5 classes) and loss, each held-out image counted once over all
    processes; those that cannot be read (label -1 - position) are left out, named and counted.

    Args:
        loader: of this process's (images, labels).
    Raises:
        UserError: where the loss is not finite.
    """
    model.eval()
    sums, unreadable = torch.zeros(4, dtype=torch.float64), []
    for batch, target in loader:
        logits = model(batch.to(accelerator.device, non_blocking=True)).float()
        target = target.to(logits.device)
        read = target >= 0
        loss = F.cross_entropy(logits, target.clamp_min(0), reduction="none")
        loss = torch.where(read, loss, 0.0)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
        per_image = torch.stack([x.float() for x in (hits[:, 0], hits.any(1), loss, read)], 1)
        unreadable += (-1 - target[~read]).tolist()
        sums += per_image.cpu().double().sum(0)
    every = gathered(accelerator, [(sums.tolist(), unreadable)])
    top1, top5, loss_sum, images = (math.fsum(own[i] for own, _ in every) for i in range(4))
    positions = sorted(position for _, own in every for position in own)
    size = len(loader.dataset)
    positions = [position for position in positions if position < size]
    on_unreadable(positions)
    if not images:
        raise UserError(f"none of the {len(positions)} images of the evaluation can be read")
    if not math.isfinite(loss_sum):
        raise UserError(f"the loss of the evaluation is {loss_sum}")
    accuracy = [100 * hits / images for hits in (top1, top5)]
    return Evaluation(accuracy[0], accuracy[1], loss_sum / images, int(images), len(positions))

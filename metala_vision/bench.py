"""`metala-vision bench`: how fast loader, training step and evaluation are, each alone."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from .build import collect, join
from .config import Config
from .engine import memory_mib
from .errors import UserError, out_of_memory
from .processes import create_accelerator

WARM_UP = 2  # batches before the clock starts
PREFETCHED = 2  # of each worker, which may be there already


@dataclass
class Speed:
    """Images a second, of one process; `memory_mib` is the most that training took."""

    model: str
    parameters: int
    batch_size: int
    device: str
    loader: float
    step: float
    evaluation: float
    memory_mib: float
    seconds: float
    """That each part was measured."""


def images_per_second(
    batch: Callable[[], int], seconds: float, wait: Callable[[], object], warm_up: int = WARM_UP
) -> float:
    """Of calls that each return how many images they took.

    Args:
        wait: for the device. warm_up: calls before the clock starts.
    """
    for _ in range(warm_up):
        batch()
    wait()
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += batch()
        wait()
    return images / (time.perf_counter() - start)


def bench(config: Config, seconds: float = 10.0) -> Speed:
    """Measure a configuration, `seconds` for each part.

    The loader gives batches that nobody takes; a training step is mixing, forward, loss, backward,
    clipping, optimizer and average of weights on one batch that is there already, an evaluation the
    forward pass on it. A run is at most as fast as the slower of loader and step.

    Raises:
        UserError: as in training; for several processes.
    """
    accelerator: Accelerator = create_accelerator(config.run.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError("bench measures one process; a run's log has the images a second of all")
    built = collect(config, accelerator)
    join(built)
    run, loaders = built.training, built.loaders
    try:
        epoch, draws = 0, iter(loaders.train)

        def load() -> int:
            nonlocal epoch, draws
            try:
                _, target, _ = next(draws)
            except StopIteration:
                epoch += 1
                loaders.batches.set_epoch(epoch)
                draws = iter(loaders.train)
                _, target, _ = next(draws)
            return len(target)

        warm_up = WARM_UP + PREFETCHED * config.data.workers
        loader = images_per_second(load, seconds, lambda: None, warm_up)
        loaders.batches.set_epoch(0)
        batch, target, _ = next(iter(loaders.train))
    finally:
        loaders.close()
    wait = torch.cuda.synchronize if accelerator.device.type == "cuda" else lambda: None

    def step() -> int:
        run.model.train()
        run.scheduler.step_update(run.step)
        run.optimizer.zero_grad()
        loss = run.loss(batch, target)
        accelerator.backward(loss)
        run.take_step(loss.detach(), (0, False))
        return len(target)

    @torch.no_grad()
    def forward() -> int:
        built.evaluated.eval()
        built.evaluated(batch.to(accelerator.device))
        return len(target)

    try:
        trained = images_per_second(step, seconds, wait)
        memory = memory_mib(accelerator.device)
        evaluated = images_per_second(forward, seconds, wait)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(config.data.batch_size) from error
    return Speed(
        config.model.model, built.parameters, len(target), str(accelerator.device), loader, trained,
        evaluated, memory, seconds,
    )  # fmt: skip


def as_lines(speed: Speed) -> str:
    """For people; the last line is what a run would reach."""
    bound = "the loader" if speed.loader < speed.step else "the model"
    reached = min(speed.loader, speed.step)
    return "\n".join([
        f"{speed.model}: {speed.parameters:,} parameters, batches of {speed.batch_size}, "
        f"{speed.device}",
        f"loader      {speed.loader:.1f} images a second",
        f"step        {speed.step:.1f} images a second, {speed.memory_mib:.0f} MiB",
        f"evaluation  {speed.evaluation:.1f} images a second",
        f"a run: at most {reached:.1f} images a second, bound by {bound}",
    ])  # fmt: skip

"""`metala-vision bench`: how fast loader, training step and evaluation are, alone and together."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from .build import collect, join
from .config import Config
from .engine import memory_mib
from .errors import UserError, out_of_memory
from .processes import create_accelerator

WARM_UP = 2  # batches before the clock starts
PREFETCHED = 2  # of each worker, which may be there already


@dataclass
class Speed:
    """Images a second, of one process.

    run: loader and step together, as a run has them. gpu_busy: percent of its last second or less
    in which the GPU computed; None without one, and where nvidia-ml-py is not installed.
    memory_mib: the most that training took.
    """

    model: str
    parameters: int
    batch_size: int
    device: str
    loader: float
    step: float
    run: float
    evaluation: float
    gpu_busy: float | None
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
    forward pass on it. In a run the loader's batches are trained on.

    Raises:
        UserError: as in training; for several processes.
    """
    accelerator: Accelerator = create_accelerator(config.run.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError("bench measures one process; a run's log has the images a second of all")
    built = collect(config, accelerator)
    join(built)
    run, loaders = built.training, built.loaders
    wait = torch.cuda.synchronize if accelerator.device.type == "cuda" else lambda: None
    epoch, draws = 0, iter(loaders.train)

    def load() -> tuple[Tensor, Tensor]:
        nonlocal epoch, draws
        try:
            batch, target, _ = next(draws)
        except StopIteration:
            epoch += 1
            loaders.batches.set_epoch(epoch)
            draws = iter(loaders.train)
            batch, target, _ = next(draws)
        return batch, target

    def step(batch: Tensor, target: Tensor) -> int:
        run.model.train()
        run.scheduler.step_update(run.step)
        run.optimizer.zero_grad()
        loss = run.loss(batch, target)
        accelerator.backward(loss)
        run.take_step(loss.detach(), (0, False))
        return len(target)

    @torch.no_grad()
    def forward(batch: Tensor, target: Tensor) -> int:
        built.evaluated.eval()
        built.evaluated(batch.to(accelerator.device))
        return len(target)

    try:
        # Images that are kept on the device are made ready there: that is waited for.
        warm_up = WARM_UP + PREFETCHED * config.data.workers
        loader = images_per_second(lambda: len(load()[1]), seconds, wait, warm_up)
        one = load()
        gpu_busy(accelerator.device)  # the first call starts what counts
        together = images_per_second(lambda: step(*load()), seconds, lambda: None, warm_up)
        busy = gpu_busy(accelerator.device)
        loaders.close()  # no worker beside what follows
        trained = images_per_second(lambda: step(*one), seconds, wait)
        memory = memory_mib(accelerator.device)
        evaluated = images_per_second(lambda: forward(*one), seconds, wait)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(config.data.batch_size) from error
    finally:
        loaders.close()
    return Speed(
        config.model.model, built.parameters, len(one[1]), str(accelerator.device), loader, trained,
        together, evaluated, busy, memory, seconds,
    )  # fmt: skip


def gpu_busy(device: torch.device) -> float | None:
    """Percent of the last second or less in which a kernel ran there, as the driver counts."""
    if device.type != "cuda":
        return None
    try:
        return float(torch.cuda.utilization(device))
    except Exception:  # no nvidia-ml-py, or a device that does not tell: other figures stand
        return None


def as_lines(speed: Speed) -> str:
    """For people; the last line is what a run reaches."""
    bound = "the loader" if speed.loader < speed.step else "the model"
    busy = "" if speed.gpu_busy is None else f", the GPU busy for {speed.gpu_busy:.0f} % of its end"
    return "\n".join([
        f"{speed.model}: {speed.parameters:,} parameters, batches of {speed.batch_size}, "
        f"{speed.device}",
        f"loader      {speed.loader:.1f} images a second",
        f"step        {speed.step:.1f} images a second, {speed.memory_mib:.0f} MiB",
        f"evaluation  {speed.evaluation:.1f} images a second",
        f"a run: {speed.run:.1f} images a second, bound by {bound}{busy}",
    ])  # fmt: skip

"""A training run from start to end: data, model, optimizer, loop, report."""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from tqdm import tqdm

from . import models  # noqa: F401  (registers ours with timm)
from .card import write_card
from .checkpoint import copy_checkpoint, save_checkpoint
from .config import Config, ModelConfig
from .data import Unreadable, create_loaders
from .engine import Evaluation, Interval, Training, evaluate, steps_of, train_epoch
from .errors import UserError, nearest, one_line
from .optim import create_optimizer, create_scheduler, peak_lr, run_length
from .plots import learning_curve
from .recipe import (
    compile_model,
    create_criterion,
    create_ema,
    create_mixing,
    create_teacher,
)
from .run_folder import RunFolder, read_metrics
from .splits import find_split
from .trackers import check_trackers, start_trackers, track

# Without a progress bar (output to a file), a line is printed this often, in seconds.
LINE_INTERVAL = 30
# What timm and torch raise for arguments that do not fit a model.
BUILD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass
class TrainResult:
    """How a run ended."""

    run_dir: Path
    last: Evaluation
    best: Evaluation
    best_epoch: int


def device_accelerator(mixed_precision: str) -> Accelerator:
    """accelerate's view of this machine: the GPU where there is one, else the CPU."""
    has_device = torch.cuda.is_available() or torch.backends.mps.is_available()
    if mixed_precision == "fp16" and not has_device:
        raise UserError("run.mixed_precision='fp16' needs a GPU; on a CPU: no, bf16")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(f"one process is supported, WORLD_SIZE is {processes}")
    return Accelerator(cpu=not has_device, mixed_precision=mixed_precision)


def create_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The configured timm model; a mistake in its name or arguments is a UserError."""
    if not timm.is_model(config.model):
        names = timm.list_models()
        raise UserError(f"unknown model {config.model!r}{nearest(config.model, names)}")
    if config.num_classes is not None and config.num_classes < num_classes:
        raise UserError(
            f"model.num_classes={config.num_classes}, but the data has {num_classes} classes"
        )
    reserved = {*ModelConfig.model_fields, "device", "dtype"} & set(config.model_kwargs)
    if reserved or config.model_kwargs.get("global_pool", "avg") in ("", None):
        key = min(reserved, default="global_pool")
        raise UserError(f"model.model_kwargs takes no {key}={config.model_kwargs[key]!r}")
    given: dict[str, Any] = {
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "drop_path_rate": config.drop_path_rate,
        "num_classes": config.num_classes or num_classes,
        **config.model_kwargs,
    }
    given = {key: value for key, value in given.items() if value is not None}
    try:
        try:
            size: dict[str, Any] = {"img_size": config.img_size} if config.img_size else {}
            model = timm.create_model(config.model, **given, **size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(config.model, **given)  # a CNN: takes any size
        if config.grad_checkpointing:
            model.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
    except BUILD_ERRORS as error:
        reason = one_line(error) or type(error).__name__
        raise UserError(f"cannot build {config.model}: {reason}") from error
    return model


def train(config: Config, name: str = "train") -> TrainResult:
    """Train as configured; leaves a run folder whose checkpoints timm loads.

    Args:
        config: the configuration; what it leaves open is resolved and kept in the run folder.
        name: of the run, the stem of a fresh run folder and the title of its curve.
    Raises:
        UserError: for what the user can mend, before any training where possible.
    """
    config = config.model_copy(deep=True)
    accelerator = device_accelerator(config.run.mixed_precision)
    check_trackers(config)
    set_seed(config.run.seed)
    split = find_split(config.data)
    model = create_model(config.model, split.num_classes)
    loaders = create_loaders(config.data, config.model, model, split, config.run.seed)
    images_per_batch = min(config.data.batch_size, len(split.train_indices))
    images_per_step = images_per_batch * min(config.optim.grad_accum_steps, len(loaders.train))
    size = loaders.preprocessing["input_size"]
    num_classes = config.model.num_classes or split.num_classes
    mixing = create_mixing(
        config.data, config.optim, num_classes, config.run.seed, images_per_batch
    )
    config.data.data_dir = split.root.resolve() if split.root else None
    config.optim.lr = peak_lr(config.optim, config.data.batch_size * config.optim.grad_accum_steps)
    config.model.img_size = size[-1]
    teacher = create_teacher(config.optim, config.model, num_classes, loaders.preprocessing)
    memory_format = torch.channels_last if config.model.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    optimizer = create_optimizer(model, config.optim, config.optim.lr)
    steps_per_epoch = steps_of(len(loaders.train), config.optim.grad_accum_steps)
    scheduler = create_scheduler(optimizer, config.optim, steps_per_epoch)
    total_steps = run_length(config.optim, steps_per_epoch)
    epochs = math.ceil(total_steps / steps_per_epoch)
    # The training loader draws what its sampler says, on every process; the scheduler is timm's.
    model, optimizer, val_loader = accelerator.prepare(model, optimizer, loaders.val)
    ema = create_ema(accelerator.unwrap_model(model), config.optim)
    evaluated = model if ema is None else ema.module
    compile_model(accelerator.unwrap_model(model), config.model)
    training = Training(
        model, create_criterion(config.optim, mixing is not None), optimizer, scheduler,
        accelerator, total_steps, config.optim.clip_grad, config.run.log_interval,
        config.optim.grad_accum_steps, mixing,
        None if teacher is None else teacher.to(accelerator.device), ema, memory_format,
    )  # fmt: skip

    run = RunFolder(config, name)
    try:
        start_trackers(accelerator, config, name, run.path)
    except UserError:
        run.close()
        raise
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{config.model.model}: {parameters:,} parameters, images {size[1]}x{size[2]}, "
        f"{split.num_classes} classes, {len(split.train_indices):,} training and "
        f"{len(split.val_indices):,} held-out images, {accelerator.device}"
    )
    print(
        f"{total_steps} steps in {epochs} epochs, peak lr {config.optim.lr:.3g}; "
        f"run folder {run.path}",
        flush=True,
    )

    last = best = None
    best_epoch = saved_step = 0
    bar = tqdm(
        total=total_steps * images_per_step, unit="img", unit_scale=True, disable=None,
        dynamic_ncols=True,
    )  # fmt: skip
    spoken = time.monotonic()

    def on_unreadable(line: str) -> None:
        run.log("unreadable", image=line)
        bar.write(line)

    unreadable = [
        Unreadable(source, indices, what, config.data.max_unreadable, on_unreadable)
        for source, indices, what in (
            (split.train, split.train_indices, "training"),
            (split.val, split.val_indices, "held-out"),
        )
    ]

    def on_interval(interval: Interval) -> None:
        nonlocal spoken
        run.log("train", **dataclasses.asdict(interval))
        track(accelerator, "train", interval.step, dataclasses.asdict(interval))
        bar.set_postfix(epoch=f"{interval.epoch:.1f}", loss=f"{interval.loss:.3f}", refresh=False)
        if bar.disable and time.monotonic() - spoken > LINE_INTERVAL:
            spoken = time.monotonic()
            minutes = (total_steps - interval.step) * images_per_step / interval.img_per_s / 60
            print(
                f"step {interval.step}/{total_steps}  loss {interval.loss:.4f}  "
                f"{interval.img_per_s:.0f} img/s  {minutes:.0f} min left",
                flush=True,
            )

    try:
        for epoch in range(1, epochs + 1):
            loaders.batches.set_epoch(epoch - 1)
            train_epoch(training, loaders.train, epoch - 1, bar.update, on_interval, unreadable[0])
            if epoch % config.run.eval_interval and epoch < epochs:
                continue
            state = {
                "epoch": epoch,
                "step": training.step,
                "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            }
            if ema is not None:  # the folder's model is the average
                state["model"] = accelerator.unwrap_model(model).state_dict()
            # Before the evaluation, which may fail: an epoch's work is not lost with it.
            save_checkpoint(
                run.path / "last", accelerator.unwrap_model(evaluated), state,
                loaders.preprocessing, split.train.classes,
            )  # fmt: skip
            saved_step = training.step
            last = evaluate(evaluated, val_loader, accelerator, unreadable[1])
            run.log("eval", step=training.step, epoch=epoch, **dataclasses.asdict(last))
            track(accelerator, "eval", training.step, dataclasses.asdict(last))
            if best is None or last.top1 > best.top1:
                best, best_epoch = last, epoch
                copy_checkpoint(run.path / "last", run.path / "best")
            learning_curve(read_metrics(run.path), name, run.path / "curve.png")
            bar.write(
                f"epoch {epoch:3d}/{epochs}  held-out loss {last.loss:.4f}  "
                f"top-1 {last.top1:.2f}  top-5 {last.top5:.2f}"
            )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with data.batch_size={config.data.batch_size}; a smaller --batch-size "
            "or --grad-checkpointing needs less"
        ) from error
    except UserError as error:
        if not saved_step:
            raise
        kept = f"the checkpoint of step {saved_step} is kept in {run.path / 'last'}"
        raise UserError(f"{error.line}; {kept}") from error
    finally:
        bar.close()
        run.close()
        accelerator.end_training()
    assert last is not None and best is not None
    facts = {
        "model": config.model.model, "parameters": parameters, "input_size": size,
        "classes": split.num_classes, "dataset": config.data.dataset, "images": last.images,
        "top1": last.top1, "top5": last.top5, "best_top1": best.top1, "best_epoch": best_epoch,
        "epochs": epochs, "steps": total_steps,
    }  # fmt: skip
    write_card(run.path, name, facts)
    return TrainResult(run.path, last, best, best_epoch)

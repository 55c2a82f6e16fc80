"""A training run from start to end: data, model, optimizer, loop, report."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn
from tqdm import tqdm

from . import models  # noqa: F401  (registers ours with timm)
from .checkpoint import copy_checkpoint, save_checkpoint
from .config import Config, ModelConfig, RunConfig, nearest
from .data import create_loaders, find_split
from .engine import Evaluation, Interval, evaluate, train_epoch
from .errors import UserError
from .optim import create_optimizer, create_scheduler, peak_lr, run_length
from .plots import learning_curve
from .run_folder import RunFolder, read_metrics


@dataclass
class TrainResult:
    """How a run ended."""

    run_dir: Path
    last: Evaluation
    best: Evaluation
    best_epoch: float


def create_accelerator(config: RunConfig) -> Accelerator:
    """accelerate's view of this machine: the GPU where there is one, else the CPU."""
    has_device = torch.cuda.is_available() or torch.backends.mps.is_available()
    if config.mixed_precision == "fp16" and not has_device:
        raise UserError("run.mixed_precision='fp16' needs a GPU; on a CPU: no, bf16")
    return Accelerator(cpu=not has_device, mixed_precision=config.mixed_precision)


def create_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The configured timm model; a mistake in its name or arguments is a UserError."""
    if not timm.is_model(config.model):
        names = timm.list_models()
        raise UserError(f"unknown model {config.model!r}{nearest(config.model, names)}")
    if config.num_classes is not None and config.num_classes < num_classes:
        raise UserError(
            f"model.num_classes={config.num_classes}, but the data has {num_classes} classes"
        )
    wanted = {
        "img_size": config.img_size,
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "drop_path_rate": config.drop_path_rate or None,
        "num_classes": config.num_classes or num_classes,
        **config.model_kwargs,
    }
    try:
        model = timm.create_model(
            config.model, **{k: v for k, v in wanted.items() if v is not None}
        )
        if config.grad_checkpointing:
            model.set_grad_checkpointing()  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"cannot build {config.model}: {error}") from error
    return model


def train(config: Config, name: str = "train") -> TrainResult:
    """Train as configured; leaves a run folder whose checkpoints timm loads.

    Args:
        config: the resolved configuration.
        name: of the run, the stem of a fresh run folder and the title of its curve.
    Raises:
        UserError: for what the user can mend, before any training where possible.
    """
    accelerator = create_accelerator(config.run)
    set_seed(config.run.seed)
    split = find_split(config.data, config.run.seed)
    model = create_model(config.model, split.num_classes)
    loaders = create_loaders(config.data, config.model, model, split, config.run.seed)
    lr = peak_lr(config.optim, config.data.batch_size * accelerator.num_processes)
    optimizer = create_optimizer(model, config.optim, lr)
    criterion = LabelSmoothingCrossEntropy(config.optim.smoothing)
    prepared = accelerator.prepare(model, optimizer, loaders.train, loaders.val)
    model, optimizer, train_loader, val_loader = prepared
    scheduler = create_scheduler(optimizer, config.optim, len(train_loader))
    total_steps = run_length(config.optim, len(train_loader))
    epochs = math.ceil(total_steps / len(train_loader))

    run = RunFolder(config, name)
    size = loaders.preprocessing["input_size"]
    parameters = sum(p.numel() for p in model.parameters())
    say = accelerator.print
    say(
        f"{config.model.model}: {parameters:,} parameters, images {size[1]}x{size[2]}, "
        f"{split.num_classes} classes, {len(split.train_indices):,} training and "
        f"{len(split.val_indices):,} held-out images, {accelerator.device}"
    )
    say(f"{total_steps} steps in {epochs} epochs, peak lr {lr:.3g}; run folder {run.path}")

    last = best = None
    best_epoch, step, saved_step = 0.0, 0, 0
    bar = tqdm(
        total=total_steps * config.data.batch_size, unit="img", unit_scale=True, disable=None
    )

    def on_interval(interval: Interval) -> None:
        run.log("train", **dataclasses.asdict(interval))
        bar.set_postfix(epoch=f"{interval.epoch:.1f}", loss=f"{interval.loss:.3f}", refresh=False)

    try:
        for epoch in range(1, epochs + 1):
            step = train_epoch(
                model, train_loader, criterion, optimizer, scheduler, accelerator, config.optim,
                step, total_steps, config.run.log_interval, bar.update, on_interval,
            )  # fmt: skip
            if epoch % config.run.eval_interval and epoch < epochs:
                continue
            last = evaluate(model, val_loader, accelerator)
            run.log("eval", step=step, epoch=epoch, **dataclasses.asdict(last))
            is_best = best is None or last.top1 > best.top1
            if is_best:
                best, best_epoch = last, epoch
            if accelerator.is_main_process:
                state = {
                    "epoch": epoch,
                    "step": step,
                    "optimizer": optimizer.state_dict(),
                    "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                    "evaluation": dataclasses.asdict(last),
                }
                try:
                    save_checkpoint(
                        run.path / "last", accelerator.unwrap_model(model), state,
                        loaders.preprocessing, split.train.classes,
                    )  # fmt: skip
                    if is_best:
                        copy_checkpoint(run.path / "last", run.path / "best")
                    learning_curve(read_metrics(run.path), name, run.path / "curve.png")
                except OSError as error:
                    raise UserError(f"cannot write to {run.path}: {error.strerror}") from error
                saved_step = step
            bar.write(
                f"epoch {epoch:3d}/{epochs}  held-out loss {last.loss:.4f}  "
                f"top-1 {last.top1:.2f}  top-5 {last.top5:.2f}"
            )
    except UserError as error:
        if not saved_step:
            raise
        kept = f"the checkpoint of step {saved_step} is kept in {run.path / 'last'}"
        raise UserError(f"{error.line}; {kept}") from error
    finally:
        bar.close()
        run.close()
    assert last is not None and best is not None
    return TrainResult(run.path, last, best, best_epoch)

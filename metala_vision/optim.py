"""Optimizer and schedule, both timm's."""

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from .config import OptimConfig
from .errors import UserError, nearest, one_line


def peak_lr(config: OptimConfig, global_batch: int) -> float:
    """lr, or lr_base scaled linearly to the batch over all processes."""
    return config.lr or config.lr_base * global_batch / config.lr_base_size


def create_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer, without weight decay on vectors and on what the model excludes."""
    names = [str(name) for name in list_optimizers()]
    if config.opt not in names:
        raise UserError(f"unknown optimizer optim.opt={config.opt!r}{nearest(config.opt, names)}")
    extra: dict[str, Any] = {}
    info = get_optimizer_info(config.opt)
    if info.has_betas and info.num_betas == 2:
        extra["betas"] = config.betas
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise UserError(
            f"optim.layer_decay={config.layer_decay}: {type(model).__name__} does not say which "
            "parameters belong to which layer"
        )
    try:
        optimizer = create_optimizer_v2(
            model, opt=config.opt, lr=lr, weight_decay=config.weight_decay,
            layer_decay=config.layer_decay, **{**extra, **config.opt_kwargs},
        )  # fmt: skip
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"cannot make optimizer {config.opt!r}: {one_line(error)}") from error
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"optim.opt={config.opt!r} needs second derivatives; choose another")
    return optimizer


def run_length(config: OptimConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    total = config.epochs * steps_per_epoch
    return min(total, config.max_steps or total)


def create_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int
) -> Scheduler:
    """Linear warm-up, then one descent to min_lr; call step_update(step) before each step.

    A run shortened below twice its warm-up warms up for its first half. timm's scheduler, not to be
    prepared by accelerate: it applies the factors of layer_decay, and counts optimizer steps.
    """
    lr = max(group["lr"] for group in optimizer.param_groups)
    for name in ("min_lr", "warmup_lr"):
        if getattr(config, name) > lr:
            raise UserError(
                f"optim.{name}={getattr(config, name)} exceeds the peak learning rate {lr:.3g}"
            )
    total = run_length(config, steps_per_epoch)
    warmup = min(math.ceil(config.warmup_epochs * steps_per_epoch), total // 2)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=total - warmup,  # one step is timm's epoch here
        decay_epochs=max(1, round(config.decay_epochs * steps_per_epoch)),
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=warmup,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert scheduler is not None
    return scheduler

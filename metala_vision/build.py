"""From a configuration to what an epoch works with: data, model, optimizer, on this process."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from . import models  # noqa: F401  (registers ours with timm)
from .config import LOADING, Config, ModelConfig
from .data import Loaders, create_loaders
from .engine import Training, steps_of
from .errors import UserError, nearest, one_line
from .optim import create_optimizer, create_scheduler, peak_lr, run_length
from .processes import is_sharded
from .recipe import (
    compile_model,
    create_criterion,
    create_ema,
    create_mixing,
    create_teacher,
    weigh_classes,
)
from .sampling import PROCESS, stream
from .splits import Split, find_split
from .transfer import (
    LONGEST,
    begins_from,
    check_whole,
    choose_trained,
    fit_head,
    frozen_modules,
    goes_on_from,
    lora_scale,
)

# What timm and torch raise for arguments that do not fit a model.
BUILD_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass
class Built:
    """A run ready to begin."""

    config: Config
    """What was left open is resolved."""
    split: Split
    loaders: Loaders
    training: Training
    evaluated: nn.Module
    """The model, or the average of its weights."""
    steps_per_epoch: int
    images_per_step: int
    """Over all processes."""
    num_classes: int
    """Outputs of the classifier."""
    begins_from: str | None = None
    """The weights, with what became of their classifier."""

    @property
    def epochs(self) -> int:
        """Begun ones, of the whole run."""
        return math.ceil(self.training.last_step / self.steps_per_epoch)

    @property
    def parameters(self) -> int:
        """Of the model that is left, without adapters."""
        named = self.training.model.named_parameters()
        return sum(p.numel() for name, p in named if ".lora_" not in name)

    def summary(self) -> str:
        """Model, images and machine in a line."""
        split, accelerator = self.split, self.training.accelerator
        height, width = self.loaders.preprocessing["input_size"][-2:]
        trained = sum(p.numel() for p in self.training.model.parameters() if p.requires_grad)
        some = f" ({trained:,} trained)" if trained != self.parameters else ""
        origin = f" from {self.begins_from}" if self.begins_from else ""
        processes = accelerator.num_processes
        where = accelerator.device.type + (f" x {processes}" if processes > 1 else "")
        return (
            f"{self.config.model.model}{origin}: {self.parameters:,} parameters{some}, "
            f"images {height}x{width}, {split.num_classes} classes, "
            f"{len(split.train_indices):,} training and {len(split.val_indices):,} held-out "
            f"images, {where}"
        )


def create_model(
    config: ModelConfig, num_classes: int, weights: dict[str, Any] | None = None
) -> nn.Module:
    """The configured timm model; a mistake in its name or arguments is a UserError.

    Args:
        weights: arguments that load them, of transfer.begins_from.
    """
    if not timm.is_model(config.model):
        names = timm.list_models()
        raise UserError(f"unknown model {config.model!r}{nearest(config.model, names)}")
    if config.num_classes is not None and config.num_classes < num_classes:
        raise UserError(
            f"model.num_classes={config.num_classes}, but the data has {num_classes} classes"
        )
    reserved = {*ModelConfig.model_fields, *LOADING} & set(config.model_kwargs)
    if reserved or config.model_kwargs.get("global_pool", "avg") in ("", None):
        key = min(reserved, default="global_pool")
        raise UserError(f"model.model_kwargs takes no {key}={config.model_kwargs[key]!r}")
    given: dict[str, Any] = {
        "patch_size": config.patch_size,
        "in_chans": config.in_chans,
        "drop_path_rate": config.drop_path_rate,
        "num_classes": config.num_classes or num_classes,
        **config.model_kwargs,
        **(weights or {}),
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
    except UserError:
        raise
    except Exception as error:
        if not weights and not isinstance(error, BUILD_ERRORS):
            raise
        # Reading weights may raise anything.
        what = "load the weights of" if weights else "build"
        reason = one_line(error) or type(error).__name__
        raise UserError(f"cannot {what} {config.model}: {reason[:LONGEST]}") from error
    return model


def collect(config: Config, accelerator: Accelerator) -> Built:
    """Everything that the configuration names, seeded, on this process alone: see join.

    Raises:
        UserError: for what the user can mend.
    """
    config = config.model_copy(deep=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    set_seed(config.run.seed)
    split = find_split(config.data)
    resumed = goes_on_from(config.model, config.run.run_dir) if config.run.resume else None
    config.model, weights = resumed or begins_from(config.model)
    origin = None
    model = create_model(config.model, split.num_classes, weights)
    num_classes = config.model.num_classes or split.num_classes
    if weights and resumed is None:
        check_whole(model, config.model, weights)
        origin = fit_head(model, split.train.classes, num_classes)
    loaders = create_loaders(
        config.data, config.model, model, split, config.run.seed, rank, world, accelerator.device
    )
    own_images = len(loaders.batches.own(0))
    accum = config.optim.grad_accum_steps
    mixing = create_mixing(config.data, config.optim, num_classes, config.run.seed, own_images)
    config.data.data_dir = split.root.resolve() if split.root else None
    config.data.val_file = config.data.val_file and config.data.val_file.resolve()
    config.optim.lr = peak_lr(config.optim, config.data.batch_size * world * accum)
    if config.model.pretrained_path is not None:
        config.model.pretrained_path = config.model.pretrained_path.absolute()
    config.model.img_size = loaders.preprocessing["input_size"][-1]
    teacher = create_teacher(config.optim, config.model, num_classes, loaders.preprocessing)
    memory_format = torch.channels_last if config.model.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    choose_trained(model, config.model)
    optimizer = create_optimizer(model, config.optim, config.optim.lr)
    counts = np.bincount([split.train.targets[i] for i in split.train_indices], None, num_classes)
    class_weights = weigh_classes(config.optim, counts)
    steps_per_epoch = steps_of(len(loaders.train), accum)
    training = Training(
        model, create_criterion(config.optim, mixing is not None, class_weights), optimizer,
        create_scheduler(optimizer, config.optim, steps_per_epoch), accelerator,
        run_length(config.optim, steps_per_epoch), config.optim.clip_grad, config.run.log_interval,
        accum, mixing, teacher, memory_format=memory_format, frozen=frozen_modules(model),
        lora_scale=lora_scale(config.model) if config.model.lora_rank else None,
    )  # fmt: skip
    images_per_step = own_images * world * min(accum, len(loaders.train))
    return Built(
        config, split, loaders, training, model, steps_per_epoch, images_per_step, num_classes,
        origin,
    )  # fmt: skip


def join(built: Built) -> None:
    """Put the model on the device and join the processes; all of them must come here.

    Raises:
        UserError: where the model cannot be compiled or averaged so, on all processes.
    """
    config, run = built.config, built.training
    accelerator = run.accelerator
    # The loaders draw what their samplers say, for each process its part; the scheduler is timm's.
    run.model, run.optimizer = accelerator.prepare(run.model, run.optimizer)
    if config.optim.model_ema and is_sharded(run.model):
        raise UserError("optim.model_ema is not supported with FSDP; DDP takes it")
    model = accelerator.unwrap_model(run.model)
    run.ema = create_ema(model, config.optim)
    compile_model(model, config.model)
    if run.teacher is not None:
        run.teacher.to(accelerator.device)
    built.evaluated = model if run.ema is None else run.ema.module
    if rank := accelerator.process_index:  # drop path and dropout differ from process to process
        set_seed(int(stream(config.run.seed, PROCESS, rank).generate_state(1)[0]))

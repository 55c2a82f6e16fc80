"""What a checkpoint holds beside the weights: a run goes on as the one it would have been."""

import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .checkpoint import FORMAT
from .engine import Training
from .errors import UserError, one_line
from .processes import gathered, is_sharded
from .transfer import merged


def rng_state() -> dict[str, Any]:
    """Of this process, in types that weights_only reads back."""
    name, keys, at, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), at, has_gauss, gauss),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def share_buffers(accelerator: Accelerator, model: nn.Module) -> None:
    """Give all processes the main one's buffers, which are those that a checkpoint holds.

    BatchNorm's statistics differ between processes until DDP's next step copies them; an average of
    the weights keeps its own.
    """
    if accelerator.num_processes > 1 and not is_sharded(model):
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _sharded_options() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def weights_of(run: Training) -> dict[str, torch.Tensor]:
    """The whole state_dict of the trained model; with FSDP all processes must ask."""
    if is_sharded(run.model):
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return get_model_state_dict(run.model, options=_sharded_options())  # pyright: ignore[reportReturnType]
    return run.accelerator.unwrap_model(run.model).state_dict()


def published_weights(run: Training) -> dict[str, torch.Tensor]:
    """What timm loads: the average where there is one, adapters merged."""
    state = weights_of(run) if run.ema is None else run.ema.module.state_dict()
    return state if run.lora_scale is None else merged(state, run.lora_scale)


def training_state(run: Training) -> dict[str, Any]:
    """Optimizer, scaler, position and, of each process, random numbers and sums.

    All processes must ask; the main one's is written.
    """
    if is_sharded(run.model):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        optimizer: Any = get_optimizer_state_dict(
            run.model, run.optimizer, options=_sharded_options()
        )
    else:
        optimizer = run.optimizer.state_dict()
    own = {
        "rng": rng_state(),
        "loss_sum": run.loss_sum,
        "unreadable": run.unreadable,
    }
    scaler = run.accelerator.scaler
    state = {
        "format": FORMAT,
        "step": run.step,
        "epoch": run.epoch,
        "place": run.place,
        "finite_steps": run.finite_steps,
        "in_a_row": run.in_a_row,
        "optimizer": optimizer,
        "scaler": None if scaler is None else scaler.state_dict(),
        "processes": gathered(run.accelerator, [own]),
    }
    if run.ema is not None or run.lora_scale is not None:  # the folder's model is another
        state["model"] = weights_of(run)
    if run.ema is not None and run.lora_scale is not None:
        state["average"] = run.ema.module.state_dict()
    return state


def restore(run: Training, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Put a run where the checkpoint was written.

    Args:
        weights: of the checkpoint's model. state: as training_state made it.
    Raises:
        UserError: for another number of processes, and weights or state of another model.
    """
    accelerator = run.accelerator
    own = state["processes"]
    if len(own) != accelerator.num_processes:
        raise UserError(
            f"the run was on {len(own)} processes, this is {accelerator.num_processes}; an exact "
            "resume needs as many"
        )
    try:
        if run.ema is not None:
            run.ema.module.load_state_dict(state.get("average", weights))
        weights = state.get("model", weights)
        if is_sharded(run.model):
            from torch.distributed.checkpoint.state_dict import set_state_dict

            set_state_dict(
                run.model, run.optimizer, model_state_dict=dict[str, Any](weights),
                optim_state_dict=state["optimizer"], options=_sharded_options(),
            )  # fmt: skip
        else:
            model: nn.Module = accelerator.unwrap_model(run.model)
            model.load_state_dict(weights)
            run.optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        run.step, run.epoch, run.place = state["step"], state["epoch"], state["place"]
        run.finite_steps, run.in_a_row = state["finite_steps"], state["in_a_row"]
        mine = own[accelerator.process_index]
        run.loss_sum, run.unreadable = mine["loss_sum"], list(mine["unreadable"])
        set_rng_state(mine["rng"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint does not fit this run: {one_line(error)}") from error

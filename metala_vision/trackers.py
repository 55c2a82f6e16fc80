"""The metrics in TensorBoard and Weights & Biases, by accelerate's trackers."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import is_tensorboard_available, is_wandb_available

from .config import Config
from .errors import UserError, one_line

AVAILABLE = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}


def check_trackers(config: Config) -> None:
    """UserError for one whose package is missing."""
    for name in config.run.trackers:
        if not AVAILABLE[name]():
            raise UserError(f"run.trackers names {name}, which is missing: pip install {name}")


def start_trackers(accelerator: Accelerator, config: Config, name: str, folder: Path) -> None:
    """Begin a run called `name`, with its files under `folder`."""
    if not config.run.trackers:
        return
    accelerator.project_configuration.set_directories(str(folder))
    try:
        accelerator.log_with = filter_trackers(list(config.run.trackers), str(folder))
        settings = {
            f"{section}.{key}": value if isinstance(value, int | float | bool) else str(value)
            for section, keys in config.model_dump(mode="json").items()
            for key, value in keys.items()
        }
        accelerator.init_trackers(name, settings)
    except Exception as error:  # a tracker's own: no network, no key
        raise UserError(f"cannot start run.trackers: {one_line(error)}") from error


def track(accelerator: Accelerator, event: str, step: int, values: dict[str, Any]) -> None:
    """The numbers of one line of metrics.jsonl, under event/."""
    accelerator.log({f"{event}/{key}": value for key, value in values.items()}, step=step)

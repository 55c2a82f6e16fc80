"""One training of associative recall, which goes on where it was stopped."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor

from metala_vision.errors import UserError, one_line
from metala_vision.files import replacing, write_text

from .mqar_data import IGNORED, RecallTask, recall_examples
from .mqar_model import RecallModel, state_floats
from .mqar_settings import RecallSettings

# What a run's file holds beside the fields of RecallRun.
FOUND = (
    "accuracy", "steps", "parameters", "state_floats", "device", "torch", "losses", "accuracies"
)  # fmt: skip
SHUFFLED = 2  # with a seed, the random numbers of an epoch; 0 and 1 are the splits of the data


@dataclass(frozen=True)
class RecallRun(RecallSettings):
    """What one training is; every number that is not here follows from them.

    seed is that of data, weights, order and dropout, batch_size that of training.
    """

    mixer: str
    length: int
    pairs: int
    dim: int
    learning_rate: float
    seed: int
    batch_size: int = 512

    @property
    def name(self) -> str:
        """Of its files."""
        return (
            f"{self.mixer}-{self.length}x{self.pairs}-d{self.dim}-lr{self.learning_rate:.3g}"
            f"-seed{self.seed}"
        )

    def task(self) -> RecallTask:
        return RecallTask(self.length, self.pairs, self.vocab, self.power, self.random_non_queries)

    def model(self, device: Any) -> RecallModel:
        return RecallModel(
            self.mixer, self.vocab, self.length, self.dim, self.num_heads, self.layers, self.conv,
            self.mlp_ratio, self.dropout, device,
        )  # fmt: skip


@dataclass
class Examples:
    """tokens [M, N], places of the questions asked [M, P], their answers [M, P]."""

    tokens: Tensor
    asked: Tensor
    answers: Tensor


@dataclass
class Progress:
    """What a run has done: of each epoch the mean training loss, and the test accuracy behind it.

    A loss that is not a number ends the run.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def examples_of(run: RecallRun, split: str, device: torch.device) -> Examples:
    """All examples of a split, the questions in the order of their places."""
    count = run.train_examples if split == "train" else run.test_examples
    tokens, targets = recall_examples(run.task(), count, run.seed, split)
    asked = np.nonzero(targets != IGNORED)[1].reshape(count, run.pairs)
    answers = np.take_along_axis(targets, asked, 1)
    parts = (tokens.astype(np.int32), asked, answers)
    return Examples(*(torch.from_numpy(part).to(device) for part in parts))


def learning_rate_of(run: RecallRun, epoch: int) -> float:
    """Of an epoch counted from 0: half a cosine over the epochs, to 0 behind the last."""
    return run.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / run.epochs))


def train_run(
    run: RecallRun, folder: Path, device: torch.device,
    told: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:  # fmt: skip
    """Train to the end, and write what was found to FOLDER/NAME.json; its contents.

    AdamW, weight decay on matrices alone, the learning rate by the epoch along a cosine to 0, no
    warm-up, no clipping. FOLDER/NAME.pt holds the state after every epoch until the run has ended;
    a run that is stopped goes on from there, on the same CPU and number of threads bit by bit.

    Args:
        told: called after every epoch, its state already on the disk.
    Raises:
        UserError: where the folder cannot be written, or a state cannot be read.
    """
    with _random_numbers(run.seed, device):
        model = run.model(device)
    groups = param_groups_weight_decay(
        model, run.weight_decay, no_weight_decay_list=tuple(model.no_weight_decay())
    )
    optimizer = torch.optim.AdamW(groups, run.learning_rate, fused=True)
    state_file, progress = folder / f"{run.name}.pt", Progress()
    if state_file.exists():
        progress = _restore(state_file, run, model, optimizer)
    train, test = (examples_of(run, split, device) for split in ("train", "test"))
    while not _ended(run, progress):
        epoch = len(progress.losses)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_of(run, epoch)
        progress.losses.append(_epoch(run, epoch, model, optimizer, train))
        progress.accuracies.append(accuracy(run, model, test))
        state = {
            "run": asdict(run), "progress": asdict(progress), "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        with replacing(state_file) as fresh:
            torch.save(state, fresh)
        told(progress)
    own = {
        "accuracy": progress.accuracies[-1],
        "steps": len(progress.losses) * math.ceil(run.train_examples / run.batch_size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_floats": state_floats(run.model("meta"), run.length),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        # JSON has no NaN
        "losses": [x if math.isfinite(x) else None for x in progress.losses],
        "accuracies": progress.accuracies,
    }
    assert tuple(own) == FOUND
    found = {**asdict(run), **own}
    write_text(folder / f"{run.name}.json", json.dumps(found, indent=1) + "\n")
    state_file.unlink(missing_ok=True)
    return found


def accuracy(run: RecallRun, model: RecallModel, examples: Examples) -> float:
    """The share of the questions whose answer has the largest logit, the mean over the examples."""
    model.eval()
    right = 0
    with torch.no_grad(), _precision(run, examples.tokens.device):
        for i in range(0, len(examples.tokens), run.batch_size):
            part = slice(i, i + run.batch_size)
            logits = model(examples.tokens[part], examples.asked[part])
            right += int((logits.argmax(2) == examples.answers[part]).sum())
    return right / examples.answers.numel()


def _ended(run: RecallRun, progress: Progress) -> bool:
    if not progress.losses:
        return False
    failed = not math.isfinite(progress.losses[-1])
    return failed or len(progress.losses) >= run.epochs or progress.accuracies[-1] > run.stop_at


def _epoch(
    run: RecallRun,
    epoch: int,
    model: RecallModel,
    optimizer: torch.optim.Optimizer,
    train: Examples,
) -> float:
    """Train for one epoch; the mean loss of the questions."""
    device = train.tokens.device
    order = np.random.default_rng([run.seed, SHUFFLED, epoch]).permutation(run.train_examples)
    places = torch.from_numpy(order).to(device)
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=device)
    with _random_numbers(run.seed * 1_000_003 + epoch + 1, device):  # of the dropout
        for chosen in places.split(run.batch_size):
            with _precision(run, device):
                logits = model(train.tokens[chosen], train.asked[chosen])
                loss = F.cross_entropy(logits.flatten(0, 1), train.answers[chosen].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(chosen)
    return total.item() / run.train_examples


@contextmanager
def _random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's random numbers are those of the seed; outside they go on as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _precision(run: RecallRun, device: torch.device) -> Any:
    if run.precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _restore(
    path: Path, run: RecallRun, model: RecallModel, optimizer: torch.optim.Optimizer
) -> Progress:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["run"] != asdict(run):
            raise ValueError("it is of another run")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return Progress(**state["progress"])
    except Exception as error:  # a pickle that is not whole raises anything
        raise UserError(f"cannot go on from {path}: {one_line(error)}; delete it") from error

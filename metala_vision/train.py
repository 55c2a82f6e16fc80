"""A training run from start to end, or from where it was stopped: loop, checkpoints, report."""

import dataclasses
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from .build import Built, collect, join
from .card import write_card
from .checkpoint import Checkpoints, load_state, load_weights
from .config import Config
from .data import Unreadable
from .engine import Evaluation, Hooks, Interval, Skipped, evaluate, train_epoch
from .errors import (
    WORKER_ERRORS,
    OwnError,
    ReportedError,
    Stopped,
    UserError,
    one_line,
    out_of_memory,
    worker_died,
)
from .plots import learning_curve
from .processes import Signals, agree, create_accelerator, gathered, is_of_the_network
from .run_folder import RunFolder, read_metrics, resumed_config
from .state import published_weights, restore, share_buffers, training_state
from .trackers import check_trackers, start_trackers, track

# Without a progress bar (output to a file), a line is printed this often, in seconds.
LINE_INTERVAL = 30
NAMES_TOLD = 3  # images of a step that was skipped, in the error line; all are in the log


@dataclass
class TrainResult:
    """How a run ended."""

    run_dir: Path
    last: Evaluation
    best: Evaluation
    best_epoch: int


def train(config: Config, name: str = "train") -> TrainResult:
    """Train as configured, or go on with a run; leaves a run folder whose checkpoints timm loads.

    A run that was stopped at any moment and resumed ends with the weights and metrics, times aside,
    of one that was not: on the same machine, with as many processes and threads (more than two
    processes: to rounding).

    Args:
        config: the configuration; what it leaves open is resolved and kept in the run folder.
        name: of the run, the stem of a fresh run folder and the title of its curve.
    Raises:
        UserError: for what the user can mend, before any training where possible.
        Stopped: by a signal; the run is saved.
    """
    accelerator = create_accelerator(config.run.mixed_precision)
    built = folder = failure = None
    try:
        config = resumed_config(config)
        check_trackers(config)
        built = collect(config, accelerator)  # a signal ends it: there is nothing to save yet
    except UserError as error:
        failure = error
    agree(accelerator, failure)
    assert built is not None
    with Signals() as signals:
        try:
            seen = gathered(accelerator, [built.split.fingerprint])
            if len(set(seen)) > 1:
                raise UserError("the processes do not see the same images")
            join(built)
            if accelerator.is_main_process:
                folder = RunFolder(built.config, name, accelerator.num_processes)
        except UserError as error:
            failure = error
        agree(accelerator, failure)
        try:
            result = Run(built, folder, name, accelerator, signals).whole()
            accelerator.wait_for_everyone()  # none ends while another still writes
            return result
        except torch.OutOfMemoryError as error:
            raise out_of_memory(config.data.batch_size) from error
        except (RuntimeError, ConnectionError) as error:
            if accelerator.num_processes == 1 or not is_of_the_network(error):
                raise
            line = f"process {accelerator.process_index} lost the others: {one_line(error)}"
            kind = UserError if accelerator.is_main_process else ReportedError
            raise kind(line) from error
        finally:
            built.loaders.close()
            if folder is not None:
                folder.close()
            accelerator.end_training()


class Run:
    """One run on this process: where it stands, and what is done when."""

    def __init__(
        self, built: Built, folder: RunFolder | None, name: str, accelerator: Accelerator,
        signals: Signals,
    ) -> None:  # fmt: skip
        self.built, self.folder, self.name = built, folder, name
        self.accelerator, self.signals = accelerator, signals
        self.config, self.training = built.config, built.training
        self.saved_step: int | None = None
        self.saved_time = time.monotonic()
        self.last: Evaluation | None = None
        self.evaluations: dict[int, tuple[int, Evaluation]] = {}  # by step, with the epoch
        self.bar: Any = None
        self.spoken = time.monotonic()
        split, accepted = built.split, built.config.data.max_unreadable
        self.unreadable = {
            what: Unreadable(source, indices, what, accepted, self.tell_unreadable)
            for source, indices, what in (
                (split.train, split.train_indices, "training"),
                (split.val, split.val_indices, "held-out"),
            )
        }

    @property
    def is_main(self) -> bool:
        return self.folder is not None

    def say(self, line: str) -> None:
        """On the main process, around the bar where there is one."""
        if not self.is_main:
            return
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def log(self, event: str, **values: Any) -> None:
        if self.folder is not None:
            self.folder.log(event, **values)

    # What is done

    def whole(self) -> TrainResult:
        """From the checkpoint, or the beginning, to the end."""
        training, config, built = self.training, self.config, self.built
        self.resume()
        if self.folder is not None:
            start_trackers(self.accelerator, config, self.name, self.folder.path)
        self.introduce()
        self.bar = tqdm(
            total=training.last_step * built.images_per_step, unit="img", unit_scale=True,
            disable=None if self.is_main else True, dynamic_ncols=True,
            initial=training.step * built.images_per_step,
        )  # fmt: skip
        hooks = Hooks(self.bar.update, self.on_interval, self.unreadable["training"],
                      self.on_skipped, self.asked, self.save, self.on_stop)  # fmt: skip
        try:
            for what, positions in built.loaders.unreadable.items():
                self.unreadable[what](positions)
            while True:
                if training.step and self.is_evaluation_due():
                    self.save()
                    self.evaluate()
                if training.step >= training.last_step or self.is_exhausted():
                    break
                built.loaders.batches.set_epoch(training.epoch, training.place)
                train_epoch(training, built.loaders.train, hooks)
        except (UserError, *WORKER_ERRORS) as error:
            told = error if isinstance(error, UserError) else worker_died(error)
            if told is None:
                raise
            raise self.with_what_is_kept(told) from error
        finally:
            self.bar.close()
            self.bar = None
        return self.report()

    def with_what_is_kept(self, error: UserError) -> UserError:
        """The error as this process is to tell it: the main one those that all have."""
        if self.folder is None:
            line = f"process {self.accelerator.process_index}: {error.line}"
            return OwnError(line) if isinstance(error, OwnError) else ReportedError(line)
        if self.saved_step is None:
            return error
        kept = f"the checkpoint of step {self.saved_step} is kept in {self.path / 'last'}"
        return UserError(f"{error.line}; {kept}")

    @property
    def path(self) -> Path:
        assert self.folder is not None
        return self.folder.path

    def introduce(self) -> None:
        built, config, training = self.built, self.config, self.training
        self.say(built.summary())
        if self.folder is not None:
            self.say(
                f"{training.last_step} steps in {built.epochs} epochs, peak lr "
                f"{config.optim.lr:.3g}; run folder {self.path}"
            )

    def resume(self) -> None:
        """Go on with the newest checkpoint of the folder that is whole, where there is one."""
        if self.config.run.resume is None:
            return
        failure, found = None, None
        try:
            checkpoints = Checkpoints(self.config.run.run_dir or Path())
            if self.folder is not None:
                checkpoints.sweep()
                found = checkpoints.newest(self.say)
        except UserError as error:
            failure = error
        agree(self.accelerator, failure)
        if self.accelerator.num_processes > 1:
            box = [found]
            torch.distributed.broadcast_object_list(box)
            found = box[0]
        if found is None:
            if self.folder is not None:  # killed before its first checkpoint
                self.folder.rewind(0, 0.0)
            return
        try:
            path = checkpoints.path(found)
            state = load_state(path)
            if state["data"] != self.built.split.fingerprint:
                raise UserError(
                    f"the images are not those that {self.config.run.run_dir} was trained on"
                )
            restore(self.training, load_weights(path), state)
            self.built.begins_from = state.get("begins_from")
            for what, positions in state["unreadable"].items():
                self.unreadable[what].positions = set(positions)
            self.evaluations = {
                step: (epoch, Evaluation(**values)) for step, epoch, values in state["evaluations"]
            }
            self.saved_step = self.training.step
            if self.folder is not None:
                self.folder.rewind(state["metrics_bytes"], state["seconds"])
                checkpoints.set_aside_behind(found)
        except UserError as error:
            failure = error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            failure = UserError(f"the checkpoint of step {found} lacks {one_line(error)}")
        agree(self.accelerator, failure)
        self.say(f"resumed at step {self.training.step} of {self.training.last_step}")

    def is_evaluation_due(self) -> bool:
        training = self.training
        if training.step >= training.last_step:
            return True
        return training.place == 0 and training.epoch % self.config.run.eval_interval == 0

    def is_exhausted(self) -> bool:
        """Whether run.patience evaluations in a row brought no better top-1."""
        patience = self.config.run.patience
        if patience is None or not self.evaluations:
            return False
        best, *_ = self.best()
        if sum(step > best for step in self.evaluations) < patience:
            return False
        self.say(f"ended by patience={patience}: no better top-1 since step {best}")
        return True

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        training = self.training
        if self.saved_step == training.step:
            return
        state, weights = training_state(training), published_weights(training)
        if self.folder is not None:
            state |= {
                "data": self.built.split.fingerprint,
                "unreadable": {k: sorted(v.positions) for k, v in self.unreadable.items()},
                "evaluations": [
                    (step, epoch, dataclasses.asdict(values))
                    for step, (epoch, values) in self.evaluations.items()
                ],
                "begins_from": self.built.begins_from,
                "metrics_bytes": self.folder.sync(),
                "seconds": self.folder.seconds(),
            }
            checkpoints = self.checkpoints()
            checkpoints.save(
                training.step, self.built.evaluated, weights, state,
                self.built.loaders.preprocessing, self.built.split.train.classes,
            )  # fmt: skip
            checkpoints.prune(self.scores())
        self.saved_step, self.saved_time = training.step, time.monotonic()

    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path, self.config.run.checkpoint_hist)

    def scores(self) -> dict[int, float]:
        return {step: values.top1 for step, (_, values) in self.evaluations.items()}

    def best(self) -> tuple[int, int, Evaluation]:
        """Step, epoch and figures of the first of the best evaluations."""
        step = max(self.evaluations, key=lambda step: (self.evaluations[step][1].top1, -step))
        return step, *self.evaluations[step]

    def evaluate(self) -> None:
        training = self.training
        epoch = training.epoch + (training.place > 0)
        share_buffers(self.accelerator, self.built.evaluated)
        last = evaluate(
            self.built.evaluated, self.built.loaders.val, self.accelerator,
            self.unreadable["held-out"],
        )  # fmt: skip
        self.last = last
        self.evaluations[training.step] = epoch, last
        figures = dataclasses.asdict(last)
        self.log("eval", step=training.step, epoch=epoch, **figures)
        track(self.accelerator, "eval", training.step, figures)
        if self.folder is not None:
            self.checkpoints().point("best", self.best()[0])
            self.checkpoints().prune(self.scores())
            learning_curve(read_metrics(self.path), self.name, self.path / "curve.png")
        self.say(
            f"epoch {epoch:3d}/{self.built.epochs}  held-out loss {last.loss:.4f}  "
            f"top-1 {last.top1:.2f}  top-5 {last.top5:.2f}"
        )

    def report(self) -> TrainResult:
        """The card and the result."""
        assert self.last is not None
        _, best_epoch, best = self.best()
        built, last = self.built, self.last
        facts = {
            "model": self.config.model.model, "parameters": built.parameters,
            "input_size": built.loaders.preprocessing["input_size"],
            "classes": built.split.num_classes, "dataset": self.config.data.dataset,
            "images": last.images, "top1": last.top1, "top5": last.top5, "best_top1": best.top1,
            "best_epoch": best_epoch, "epochs": self.evaluations[self.training.step][0],
            "steps": self.training.step, "begins_from": built.begins_from,
        }  # fmt: skip
        if self.folder is not None:
            write_card(self.path, self.name, facts)
            self.folder.finish(facts)
        path = self.path if self.folder is not None else self.config.run.run_dir or Path()
        return TrainResult(path, last, best, best_epoch)

    # What the loop tells and asks

    def tell_unreadable(self, line: str) -> None:
        self.log("unreadable", image=line)
        self.say(line)

    def on_interval(self, interval: Interval) -> None:
        values, last_step = dataclasses.asdict(interval), self.training.last_step
        self.log("train", **values)
        track(self.accelerator, "train", interval.step, values)
        self.bar.set_postfix(
            epoch=f"{interval.epoch:.1f}", loss=f"{interval.loss:.3f}", refresh=False
        )
        if self.is_main and self.bar.disable and time.monotonic() - self.spoken > LINE_INTERVAL:
            self.spoken = time.monotonic()
            left = (last_step - interval.step) * self.built.images_per_step
            self.say(
                f"step {interval.step}/{last_step}  loss {interval.loss:.4f}  "
                f"{interval.img_per_s:.0f} img/s  {left / interval.img_per_s / 60:.0f} min left"
            )

    def on_skipped(self, skipped: Skipped) -> None:
        split, batches = self.built.split, self.built.loaders.batches
        order = batches.order(skipped.epoch)
        names = [
            split.train.name(split.train_indices[int(order[place])])
            for batch in skipped.batches
            for place in batches.places(batch)
        ]
        loss = str(skipped.loss)  # JSON has no nan
        self.log("skipped", step=skipped.step, loss=loss, in_a_row=skipped.in_a_row, images=names)
        what = f"step {skipped.step}: the loss ({loss}) or a gradient is not finite"
        self.say(f"{what}; skipped")
        if skipped.in_a_row > self.config.run.max_skipped:
            more = ", ..." if len(names) > NAMES_TOLD else ""
            raise UserError(
                f"{what}, {skipped.in_a_row} steps in a row, more than "
                f"run.max_skipped={self.config.run.max_skipped}; a lower lr, clip_grad or another "
                f"mixed_precision may help; its images: {', '.join(names[:NAMES_TOLD])}{more}"
            )

    def asked(self) -> tuple[int, bool]:
        age = time.monotonic() - self.saved_time
        # One clock decides.
        return self.signals.received, self.is_main and age > 60 * self.config.run.checkpoint_minutes

    def on_stop(self, number: int) -> None:
        name, step = signal.Signals(number).name, self.training.step
        folder = self.folder.path if self.folder else self.config.run.run_dir or "the run"
        line = f"stopped by {name}, saved at step {step}; go on with --resume {folder}"
        raise Stopped(number, line if self.is_main else "")

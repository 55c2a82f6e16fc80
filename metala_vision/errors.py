"""What goes wrong by a user's mistake, as one clear line."""

import difflib
import signal
from types import TracebackType


def one_line(text: object) -> str:
    """Any message with its line breaks and runs of blanks as single blanks."""
    return " ".join(str(text).split())


def nearest(word: str, words: list[str]) -> str:
    """'; did you mean X?' for the closest of `words`, or ''."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]}?" if close else ""


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: the value, and what is accepted.

    Commands print it after "error:" and exit with status 2, without a traceback.
    """

    @property
    def line(self) -> str:
        """The message as one line, also when a data worker has wrapped it in its traceback."""
        text = str(self).strip()
        if "Original Traceback" in text:
            name = f"{type(self).__module__}.{type(self).__qualname__}: "
            text = text.rpartition(name)[2]
        return one_line(text)


class UnreadableImage(UserError):
    """An image file that cannot be decoded."""


class WeightsError(UserError, RuntimeError):
    """Pretrained weights that are not there, or are not what they should be.

    A RuntimeError besides, as timm's are.
    """


class OwnError(UserError):
    """An error that one process of several has: it tells it itself."""


# What torch raises where a data worker has died: its own error, at any line, or that of the socket
# over which the worker was about to hand a batch.
WORKER_ERRORS = (RuntimeError, ConnectionError, EOFError, FileNotFoundError)


def worker_died(error: BaseException) -> OwnError | None:
    """What to tell the user, where one of WORKER_ERRORS means that; else None."""
    what = None
    if "DataLoader worker" in str(error):
        told: BaseException | None = error
        while told is not None and "killed by signal" not in str(told):
            told = told.__cause__ or told.__context__
        what = one_line(told or error).rstrip(" .")
    elif not isinstance(error, RuntimeError):
        what = _dead_worker(error.__traceback__)
    if what is None:
        return None
    return OwnError(
        f"{what}. Out of memory is a common cause: fewer --workers need less; with "
        "--workers 0 an error shows itself"
    )


def _dead_worker(trace: TracebackType | None) -> str | None:
    """Of the loader in whose call an error was raised, in torch's words."""
    while trace is not None:
        loader = trace.tb_frame.f_locals.get("self")
        for worker in getattr(loader, "_workers", ()):
            try:
                worker.join(0.5)
            except RuntimeError as told:  # torch's handler of the signal, at any line
                return one_line(told).rstrip(" .")
            if worker.exitcode is not None and worker.exitcode < 0:
                name = signal.strsignal(-worker.exitcode)
                return f"DataLoader worker (pid {worker.pid}) is killed by signal: {name}"
        trace = trace.tb_next
    return None


def out_of_memory(batch_size: int) -> UserError:
    """What to tell the user where the device is full."""
    return UserError(
        f"out of memory with data.batch_size={batch_size}; a smaller --batch-size or "
        "--grad-checkpointing needs less"
    )


class ReportedError(UserError):
    """An error that another process tells the user."""


class Stopped(Exception):
    """A signal ended the run, which is saved; `status` is the exit status that shells give it."""

    def __init__(self, number: int, line: str) -> None:
        super().__init__(line)
        self.status = 128 + number

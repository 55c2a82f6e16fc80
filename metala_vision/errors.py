"""What goes wrong by a user's mistake, as one clear line."""

import difflib


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


def worker_died(error: RuntimeError) -> OwnError | None:
    """What to tell the user, where that is what torch has raised; it may come at any line."""
    if "DataLoader worker" not in str(error):
        return None
    told: BaseException | None = error
    while told is not None and "killed by signal" not in str(told):
        told = told.__cause__ or told.__context__
    what = one_line(told or error).rstrip(" .")
    return OwnError(
        f"{what}. Out of memory is a common cause: fewer --workers need less; with "
        "--workers 0 an error shows itself"
    )


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

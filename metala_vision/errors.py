"""What goes wrong by a user's mistake, as one clear line."""


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: the value, and what is accepted.

    Commands print it after "error:" and exit with status 2, without a traceback.
    """

    @property
    def line(self) -> str:
        """The message as one line, also when a data worker has wrapped it in its traceback."""
        last = str(self).strip().splitlines()[-1]
        return last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")

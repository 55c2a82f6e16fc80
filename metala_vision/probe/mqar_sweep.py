"""What a sweep of associative recall trains, and the settings that have a name."""

import dataclasses
from dataclasses import dataclass, field
from math import inf
from typing import Any

from metala_vision.errors import UserError

from .mqar_settings import RecallSettings

CONVS = "published, causal1d, causal1d(WIDTH), none"
LOGSPACE_4_2 = [1e-4, 4.64e-4, 2.15e-3, 1e-2]  # four from 10^-4 to 10^-2
LOGSPACE_5_3 = [1e-5, 4.64e-5, 2.15e-4, 1e-3]


@dataclass(frozen=True, kw_only=True)
class Sweep(RecallSettings):
    """What is trained; the defaults are MetaLA's section 6 on the data of Zoology's figure 2.

    mixers: families, none for all that have a causal form. lengths: (length, pairs).
    learning_rates: none for those published, four from 1e-4 to 1e-2, from length 512 on also four
        from 1e-5 to 1e-3. sweep_seeds: how many of the seeds are trained at every learning rate;
        the others at the best of them alone. None for all.
    batch_size: None for 512, less from length 256 on: 65,536 tokens.
    """

    mixers: list[str] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(
        default_factory=lambda: [(64, 4), (128, 8), (256, 16), (512, 64)]
    )
    dims: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    learning_rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    sweep_seeds: int | None = None
    batch_size: int | None = None

    def rates(self, length: int) -> list[float]:
        """The learning rates of a length, in ascending order."""
        if self.learning_rates:
            return sorted(self.learning_rates)
        return sorted(LOGSPACE_4_2 + (LOGSPACE_5_3 if length >= 512 else []))

    def shared(self) -> dict[str, Any]:
        """What all runs of a folder have in common; the other fields may grow."""
        names = [field.name for field in dataclasses.fields(RecallSettings)]
        return {name: getattr(self, name) for name in ("batch_size", *names)}

    def run(self, mixer: str, length: tuple[int, int], dim: int, rate: float, seed: int) -> Any:
        from .mqar_run import RecallRun

        batch = self.batch_size or max(1, min(512, 65_536 // length[0]))
        own = {**self.shared(), "batch_size": batch}
        return RecallRun(mixer, length[0], length[1], dim, rate, seed, **own)

    def check(self) -> None:
        """UserError, naming the flag, for a value that cannot be."""
        several: dict[str, list[Any]] = {
            "--lengths": self.lengths, "--dims": self.dims, "--seeds": self.seeds,
            "--learning-rates": self.learning_rates, "--mixers": self.mixers,
        }  # fmt: skip
        for flag, given in several.items():
            twice = next((value for value in given if given.count(value) > 1), None)
            if twice is not None:
                raise UserError(f"{flag}: {told(twice)} is given twice")
        for flag, least, value in (
            ("--dims", 1, min(self.dims)), ("--seeds", 0, min(self.seeds)),
            ("--sweep-seeds", 1, self.sweep_seeds), ("--batch-size", 1, self.batch_size),
            ("--train-examples", 1, self.train_examples),
            ("--test-examples", 1, self.test_examples), ("--epochs", 1, self.epochs),
            ("--num-heads", 1, self.num_heads), ("--layers", 1, self.layers),
        ):  # fmt: skip
            if value is not None and value < least:
                raise UserError(f"{flag} needs {least} or more, got {value}")
        for rate in self.learning_rates:
            if not 0 < rate < inf:
                raise UserError(f"--learning-rates needs numbers above 0, got {rate:g}")
        for flag, value, below in (
            ("--weight-decay", self.weight_decay, inf), ("--dropout", self.dropout, 1.0),
            ("--mlp-ratio", self.mlp_ratio, inf), ("--stop-at", self.stop_at, inf),
        ):  # fmt: skip
            if value is not None and not 0 <= value < below:
                limit = "" if below == inf else f" and below {below:g}"
                raise UserError(f"{flag} needs a number of 0 or more{limit}, got {value:g}")
        if max(self.seeds) >= 2**32:
            raise UserError(f"--seeds needs numbers below 2^32, got {max(self.seeds)}")
        self.check_conv()
        named: dict[str, float] = {}
        for rate in self.learning_rates:
            if named.setdefault(f"{rate:.3g}", rate) != rate:
                raise UserError(f"--learning-rates: {rate:g} is too near another: runs are named "
                                f"by three digits")  # fmt: skip
        if (self.sweep_seeds or 0) > len(self.seeds):
            raise UserError(f"--sweep-seeds {self.sweep_seeds}: --seeds are {len(self.seeds)}")

    def check_conv(self) -> None:
        """UserError for a convolution that is not causal or longer than every sequence."""
        if self.conv in ("published", "none"):
            return
        from metala_vision.layers.conv import causal_width

        longest = max(length for length, _ in self.lengths)
        try:
            width = causal_width(self.conv)
        except ValueError:
            width = 0
        if not width:
            raise UserError(f"--conv {self.conv}: accepted are {CONVS}")
        if width > longest:
            raise UserError(f"--conv {self.conv}: the longest of --lengths is {longest}")


SETTINGS: dict[str, dict[str, Any]] = {
    "small": {
        "lengths": [(64, 8)], "dims": [64], "seeds": [0, 1, 2], "sweep_seeds": 1, "vocab": 64,
        "train_examples": 8_000, "test_examples": 500, "batch_size": 64, "epochs": 16,
        "learning_rates": LOGSPACE_4_2[1:], "dropout": 0.0, "mlp_ratio": 0.0,
    },
    "published": {},
    "hard": {"lengths": [(512, 80)], "dims": [64, 128]},
}  # fmt: skip


def told(value: Any) -> str:
    """A setting as its flag has it."""
    return f"{value[0]}:{value[1]}" if isinstance(value, tuple) else f"{value}"

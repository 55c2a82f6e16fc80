"""What `metala-vision probe conditions` measures: how much of it, and the rows that it leaves."""

from dataclasses import dataclass

SIZES, STEPS, TARGETS = (1, 2, 4, 8, 16, 32), 500, 3
QUICK_SIZES, QUICK_STEPS = (1, 8), 20
NEAR = 0.05  # a map that is nearer than this to its target, relative, counts as represented
SHARES = (0.05, 0.5, 0.95)
MAX_IMAGES = 16
SIDE, INPUTS = 14, 4  # of the maps of tokens at which decays are looked at


@dataclass
class Fit:
    """Errors of the best fit by target: the relative Frobenius norm, and the RMS over rows."""

    name: str
    K: int
    error: list[float]
    rows: list[float]


@dataclass
class Dynamics:
    """How the decay of a mixer, or of all layers of a model, answers its input.

    changes: whether it differs at all between tokens or inputs. spread: the standard deviation
    of log alpha over tokens, over its mean, by channel; the mean over channels. half_lives:
    quantiles SHARES over tokens and channels, in tokens; None where nothing is forgotten.
    """

    name: str
    changes: bool
    spread: float
    half_lives: list[float | None]


@dataclass
class Row:
    """What was measured of one mixer. fits: by state size. parameters: over C^2, by function.

    has: query, own key, dynamic decay. verdicts: of the three conditions, see verdicts.
    """

    name: str
    dynamics: Dynamics
    fits: list[Fit]
    has: tuple[bool, bool, bool]
    parameters: dict[str, float]
    verdicts: tuple[bool, bool | None, bool | None]

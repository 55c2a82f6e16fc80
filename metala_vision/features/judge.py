"""How well frozen features tell classes apart: weighted nearest neighbours and a linear probe.

Neither trains the network. Guesses are [m, 5] labels (fewer for fewer classes), -1 for none.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from metala_vision.errors import UserError

TEMPERATURE = 0.07  # arXiv 1805.01978, section 3.4, and 2104.14294
CHUNK = 1024  # queries at a time, fewer where their similarities would take much memory
MOST_PAIRS = 2**26  # of a chunk: 256 MiB
GRID = (
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
    10.0,
    100.0,
    1000.0,
)  # of C, the inverse strength of the weights' penalty
PART = 5  # a fifth of the training images chooses among them
MAX_ITER = 1000  # of lbfgs


def neighbours(train: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k training images nearest by cosine similarity, the nearest first.

    Args:
        train: [n, D]. queries: [m, D].
    Returns:
        similarities [m, k], indices into train [m, k].
    """
    known = F.normalize(torch.from_numpy(train), dim=1)
    values, indices = [], []
    for chunk in torch.from_numpy(queries).split(max(1, min(CHUNK, MOST_PAIRS // len(train)))):
        nearest = (F.normalize(chunk, dim=1) @ known.T).topk(k, dim=1)
        values.append(nearest.values)
        indices.append(nearest.indices)
    return torch.cat(values).numpy(), torch.cat(indices).numpy()


def vote(similarities: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Guesses by the sum over a class's neighbours of exp(similarity / TEMPERATURE), as DINO's
    (arXiv 2104.14294) after instance discrimination's (arXiv 1805.01978).

    Args:
        similarities, labels: of the neighbours, [m, k].
    """
    guesses = []
    for start in range(0, len(labels), CHUNK):
        own = torch.from_numpy(labels[start : start + CHUNK]).long()
        weights = torch.from_numpy(similarities[start : start + CHUNK]).double() / TEMPERATURE
        votes = torch.zeros(len(own), classes, dtype=torch.float64)
        best = votes.scatter_add_(1, own, weights.exp()).topk(min(5, classes), dim=1)
        guesses.append(best.indices.masked_fill(best.values == 0, -1))  # nobody's vote
    return torch.cat(guesses).numpy()


@dataclass
class Trial:
    """A C of the grid: top-1 in percent on the part that chooses."""

    C: float
    top1: float
    iterations: int
    converged: bool


@dataclass
class Probe:
    """A logistic regression on all training features with the C that was best on a part of them.

    guesses: of the held-out images. trials: empty where no class had an image for the part.
    """

    C: float
    iterations: int
    converged: bool
    guesses: np.ndarray
    trials: list[Trial] = field(default_factory=list)

    @property
    def at_edge(self) -> bool:
        """Whether a C beyond the grid may be better."""
        return bool(self.trials) and self.C in (GRID[0], GRID[-1])


def linear_probe(train: np.ndarray, labels: np.ndarray, queries: np.ndarray, seed: int) -> Probe:
    """Multinomial logistic regression by lbfgs on features of mean 0 and variance 1.

    Of equally good C the smallest is taken. Everything is in float64: lbfgs stops early in float32.

    Args:
        train: [n, D]. labels: [n]. queries: [m, D]. seed: draws the part that chooses C.
    Raises:
        UserError: training images of a single class.
    """
    if len(np.unique(labels)) < 2:
        raise UserError("a linear probe needs readable training images of two classes")
    train, queries = train.astype(np.float64), queries.astype(np.float64)
    part, trials, best = held_part(labels, seed), [], 1.0
    if part.any():
        for C in GRID:
            model, iterations, converged = _fit(train[~part], labels[~part], C)
            top1 = 100 * float((_guess(model, train[part])[:, 0] == labels[part]).mean())
            trials.append(Trial(C, top1, iterations, converged))
        best = max(trials, key=lambda trial: trial.top1).C
    model, iterations, converged = _fit(train, labels, best)
    return Probe(best, iterations, converged, _guess(model, queries), trials)


def held_part(labels: np.ndarray, seed: int) -> np.ndarray:
    """[n], True for a fifth of each class, at least one image where the class has two."""
    chosen = np.zeros(len(labels), bool)
    draws = np.random.default_rng(seed)
    for label in np.unique(labels):
        own = draws.permutation(np.flatnonzero(labels == label))
        if len(own) > 1:
            chosen[own[: max(1, len(own) // PART)]] = True
    return chosen


def _fit(features: np.ndarray, labels: np.ndarray, C: float) -> tuple[Pipeline, int, bool]:
    """The model, its iterations, and whether they were enough."""
    regression = LogisticRegression(C=C, max_iter=MAX_ITER)
    model = make_pipeline(StandardScaler(), regression)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.fit(features, labels)
    converged = not any(issubclass(x.category, ConvergenceWarning) for x in told)
    return model, int(np.max(regression.n_iter_)), converged


def _guess(model: Pipeline, features: np.ndarray) -> np.ndarray:
    scores = model.decision_function(features)  # probabilities of 0 or 1 would not be ranked
    if scores.ndim == 1:  # of two classes
        scores = np.stack([-scores, scores], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    return model[-1].classes_[order]


def accuracy(guesses: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """top-1 and top-5 in percent."""
    hits = guesses == labels[:, None]
    return 100 * float(hits[:, 0].mean()), 100 * float(hits.any(1).mean())

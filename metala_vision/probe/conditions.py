"""`metala-vision probe conditions`: MetaLA's three conditions, measured on every gated recurrence.

Dynamic memory: does the decay follow the input? Static approximation: how near does the implicit
attention map come to a random softmax map, by the size of the state? Least parameters: what do
query, key and decay cost?
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metala_vision.errors import UserError, nearest
from metala_vision.files import check_outputs, write_text

from .unified import between, read_marked, table

if TYPE_CHECKING:
    from .systems import System

MARK = "metala-vision probe conditions"
STATES = (1, 2, 4, 8, 16, 32)
SIDE = 14  # of the map of tokens whose decays are looked at
# MetaLA, arXiv 2411.10741, Table 2 and section 3; systems that it does not place have no entry.
CLAIMS = {
    "metala": "meets all three",
    "gla": "not least parameters",
    "mamba": "not least parameters",
    "retnet": "no dynamic memory",
    "transnormer": "no dynamic memory",
    "lru": "no query, no dynamic memory",
}
HEAD = (
    "system", "the paper", "decay moves", "half-life, tokens: 5 %", "50 %", "95 %",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; imports nothing of torch."""
    add = parser.add_argument
    add("--systems", nargs="+", metavar="NAME", help="[all]")
    add("--models", nargs="+", default=[], metavar="MODEL",
        help="decays of these too: folders that runs left, or timm names with weights")  # fmt: skip
    add("--states", nargs="+", type=int, default=list(STATES), metavar="K",
        help="states of a head, powers of 2 up to 32 [1 2 4 8 16 32]")  # fmt: skip
    add("--targets", type=int, default=3, help="random softmax maps [3]")
    add("--steps", type=int, default=1000, help="of Adam for each map [1000]")
    add("--json", type=Path, metavar="FILE", help="every number as JSON")
    add("--update", type=Path, metavar="FILE",
        help=f"put the tables into this file, between its marks <!-- {MARK} --> and <!-- end -->",
        )  # fmt: skip


def run(given: argparse.Namespace) -> int:
    """Measure, print the tables, and write what was asked for.

    Raises:
        UserError: before anything is measured, for a value that cannot be or a file that cannot be
            written.
    """
    _check(given)
    text = None if given.update is None else read_marked(given.update, MARK)
    check_outputs({"--json": given.json, "--update": given.update})
    found = measure(given.systems, given.models, given.states, given.targets, given.steps)
    tables = as_markdown(found)
    print(tables)
    if given.json is not None:
        write_text(given.json, json.dumps(found, indent=1) + "\n")
    if given.update is not None and text is not None:
        write_text(given.update, between(text, MARK, tables))
    return 0


def _check(given: argparse.Namespace) -> None:
    wrong = [K for K in given.states if K not in STATES]
    if wrong:
        raise UserError(f"--states: {wrong[0]} is not one of {', '.join(map(str, STATES))}")
    if given.targets < 1 or given.steps < 1:
        raise UserError(
            f"--targets and --steps need 1 or more, got {given.targets} and {given.steps}"
        )
    from .fit import MIXERS

    for name in given.systems or ():
        if name not in MIXERS:
            raise UserError(
                f"--systems: {name!r} is unknown; accepted: {', '.join(MIXERS)}"
                f"{nearest(name, list(MIXERS))}"
            )


def measure(
    names: list[str] | None = None,
    models: list[str] | None = None,
    states: list[int] | tuple[int, ...] = STATES,
    targets: int = 3,
    steps: int = 1000,
) -> dict[str, Any]:
    """What the tables hold, as JSON has it.

    Args:
        names: systems, None for all. models: as `evaluate.load_model` reads them.
        states, targets, steps: of the fits, see fit.fit.
    Raises:
        UserError: naming a model that cannot be loaded or has no gated recurrence.
    """
    from metala_vision.evaluate import load_model

    from .fit import fit
    from .systems import registered, systems_of

    trained = {}
    for name in models or ():
        trained[name] = systems_of(name, load_model(name).eval())
        if not trained[name]:
            raise UserError(f"--models: {name} has no gated recurrence")
    found: dict[str, Any] = {"systems": {}, "models": {}, "steps": steps, "targets": targets}
    for system in registered(names=names):
        fits = {}
        for K in sorted(set(states)):
            one = fit(system.name, K, targets, steps)
            if one is not None:
                fits[K] = {"error": one.error, "rows": one.rows}
            _tell(system.name, K, one)
        found["systems"][system.name] = {
            "dynamic": decays([system]), "fits": fits, **counts(system)
        }  # fmt: skip
    for name, systems in trained.items():
        found["models"][name] = {"dynamic": decays(systems)}
    return found


def decays(systems: list["System"]) -> dict[str, Any]:
    """How the decays of these mixers move over standard normal tokens.

    moves: the standard deviation of log alpha over the tokens, over the size of its mean; the
    median over channels, heads, passes and mixers; exactly 0 where no token changes it.
    half_lives: ln 2 / -log |alpha| in tokens, their 5, 50 and 95 % quantiles; infinite for 1.
    """
    import torch

    from .systems import tokens

    moves, sizes = [], []
    with torch.no_grad():
        for system in systems:
            for alpha in system.forgetting(tokens(system.dim, SIDE, seed=4)):
                log_decay = alpha.abs().log().flatten(0, 1).flatten(1)  # [N, H K]
                still = (log_decay == log_decay[:1]).all(0)
                share = log_decay.std(0) / log_decay.mean(0).abs()
                moves.append(torch.where(still, 0.0, share))
                sizes.append(log_decay.flatten())
    lives = (math.log(2) / torch.cat(sizes).abs()).sort().values
    picked = [lives[int(share * (len(lives) - 1))].item() for share in (0.05, 0.5, 0.95)]
    return {
        "moves": torch.cat(moves).median().item(),
        "half_lives": [x if math.isfinite(x) else None for x in picked],
    }


def counts(system: "System") -> dict[str, Any]:
    """Parameters of each function over C^2, and which of query, own key and dynamic decay exist."""
    from .systems import classes, parameters

    own = parameters(system)
    return {
        "parameters": {name: count / system.dim**2 for name, count in own.items()},
        "has": dict(zip(("query", "own key", "dynamic decay"), classes(system), strict=True)),
    }


def as_markdown(found: dict[str, Any]) -> str:
    """The table of the systems, and one of the models if there are any."""
    states = sorted({K for one in found["systems"].values() for K in one["fits"]})
    head = (
        *HEAD, *(f"misfit, K = {K}" for K in states), "query", "own key", "dynamic decay",
        "q, k, alpha / C^2", "all / C^2",
    )  # fmt: skip
    rows = []
    for name, one in found["systems"].items():
        cost = one["parameters"]
        rows.append([
            name, CLAIMS.get(name, "-"), *_decays(one["dynamic"]),
            *(_misfit(one["fits"].get(K)) for K in states),
            *("yes" if own else "no" for own in one["has"].values()),
            f"{cost['query'] + cost['key'] + cost['decay']:.2f}",
            f"{sum(cost.values()) - cost['conv']:.2f}",
        ])  # fmt: skip
    text = table(head, rows, 2)
    if found["models"]:
        own = [[name, *_decays(one["dynamic"])] for name, one in found["models"].items()]
        text += "\n\n" + table(("model", *HEAD[2:]), own, 1)
    return text


def _decays(one: dict[str, Any]) -> list[str]:
    lives = ["never" if life is None else f"{life:.3g}" for life in one["half_lives"]]
    return [f"{one['moves']:.2f}" if one["moves"] else "0", *lives]


def _misfit(one: dict[str, list[float]] | None) -> str:
    """Mean over the targets and half their range, in percent of the target's norm."""
    if one is None:
        return "-"
    error = one["error"]
    mean, half = sum(error) / len(error), (max(error) - min(error)) / 2
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def _tell(name: str, K: int, one: Any) -> None:
    if one is not None and sys.stderr.isatty():
        print(f"\r\x1b[K{name}, K = {K}: {_misfit({'error': one.error})} %", end="",
              file=sys.stderr, flush=True)  # fmt: skip

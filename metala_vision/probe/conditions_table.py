"""The tables of `metala-vision probe conditions`, and what the paper claims beside them."""

from collections.abc import Sequence

from .conditions_rows import NEAR, Dynamics, Row
from .fit import RATES, TOKENS, WIDTH
from .unified import table

# MetaLA, arXiv 2411.10741, Table 2, as far as it was read: dynamic memory, static approximation,
# least parameters; None where the reading does not say.
PAPER: dict[str, tuple[bool | None, bool | None, bool | None]] = {
    "metala": (True, True, True),
    "gla": (True, True, False),
    "mamba": (True, True, False),
    "retnet": (False, None, None),
    "transnormer": (False, None, None),
    "lru": (False, False, None),
}
CONDITIONS = ("dynamic memory", "static approximation", "least parameters")
# What can be reached with K >= N states; each is shown by a test, by hand or by rank.
BOUNDS = {
    "metala": "any, in the limit: state s writes at token s alone (alpha to 0), else alpha to 1",
    "hgrn2": "any, in the limit: as MetaLA",
    "linear_attention": "any positive, in the limit: keys that are unit vectors",
    "regla": "any positive, in the limit: keys that are unit vectors, decay 1",
    "gla": "any: free q and k",
    "mamba": "any: free q and k",
    "retnet": "any: free q and k",
    "transnormer": "any: free q and k",
    "hgrn": "none: one state a channel",
    "lru": "none: one state a channel, no query",
}
WORDS = {True: "yes", False: "no", None: "-"}


def as_markdown(rows: Sequence[Row], models: Sequence[Dynamics] = ()) -> str:
    """Verdicts beside the paper's, then the figures of each condition."""
    blocks = [_verdicts(rows), *_disagreements(rows), decays_table(rows, models), _fits(rows)]
    return "\n\n".join([*blocks, parameters_table(rows)])


def _verdicts(rows: Sequence[Row]) -> str:
    head = ("mixer", "query", "own key", "dynamic decay", *CONDITIONS, "the paper's Table 2")
    body = []
    for row in rows:
        claims = PAPER.get(row.name)
        paper = "not in it" if claims is None else ", ".join(
            f"{WORDS[own]}" if own is not None else "not read" for own in claims
        )  # fmt: skip
        body.append([
            row.name, *(WORDS[own] for own in row.has), *(WORDS[own] for own in row.verdicts), paper
        ])  # fmt: skip
    return table(head, body, 1)


def _disagreements(rows: Sequence[Row]) -> list[str]:
    """Sentences: where a verdict is not the paper's, and who else meets all three."""
    lines = []
    for row in rows:
        for what, own, claim in zip(
            CONDITIONS, row.verdicts, PAPER.get(row.name, (None,) * 3), strict=True
        ):
            if None not in (own, claim) and own is not claim:
                lines.append(
                    f"Not as the paper has it: {row.name}, {what}: measured {WORDS[own]}, the "
                    f"paper {WORDS[claim]}."
                )
    others = [row.name for row in rows if all(row.verdicts) and row.name not in PAPER]
    if others:
        lines.append(f"Not in the paper's table, and meets all three too: {', '.join(others)}.")
    if not any(line.startswith("Not as") for line in lines):
        lines.insert(0, "Nothing measured is other than the paper has it, where it says.")
    return ["\n".join(lines)]


def decays_table(rows: Sequence[Row], models: Sequence[Dynamics]) -> str:
    """Condition 1: of the mixers, then of models."""
    head = ("1, dynamic memory", "input changes alpha", "spread of log alpha", "half-life p5",
            "p50", "p95")  # fmt: skip
    body = []
    for own in [*(row.dynamics for row in rows), *models]:
        lives = ["none" if value is None else f"{value:.3g}" for value in own.half_lives]
        spread = f"{own.spread:.3f}" if own.spread else "0"
        body.append([own.name, WORDS[own.changes], spread, *lives])
    return table(head, body, 1)


def _fits(rows: Sequence[Row]) -> str:
    sizes = sorted({own.K for row in rows for own in row.fits})
    head = (f"2, error at N = {TOKENS}", *(f"K = {K}" for K in sizes), "rows, largest K",
            "reachable, K >= N")  # fmt: skip
    body = []
    for row in rows:
        by_size = {own.K: own for own in row.fits}
        cells = []
        for K in sizes:
            own = by_size.get(K)
            cells.append("-" if own is None else told(own.error))
        body.append([row.name, *cells, told(row.fits[-1].rows), BOUNDS[row.name]])
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return table(head, body, 1) + (
        f"\n\nMean and standard deviation over the targets, each the best of learning rates "
        f"{rates}\nand of all steps; C = {WIDTH}. Below {NEAR:g} on every target at the largest K "
        "counts as represented."
    )


def told(values: Sequence[float]) -> str:
    """Mean and standard deviation, as few digits as tell."""
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    if mean < 5e-4:
        return f"{mean:.0e}"
    return f"{mean:.3f} ± {spread:.3f}" if len(values) > 1 else f"{mean:.3f}"


def parameters_table(rows: Sequence[Row]) -> str:
    """Condition 3: parameters over C^2 by function."""
    names = ("query", "key", "value", "decay", "gate", "out")
    head = ("3, parameters / C^2", *names, "all")
    body = []
    for row in rows:
        shares = [row.parameters[name] for name in names]
        body.append([row.name, *(f"{x:.2f}" if x else "0" for x in shares), f"{sum(shares):.2f}"])
    return table(head, body, 1)

"""`metala-vision probe unified`: the gated recurrences as rows of one table."""

import argparse
from pathlib import Path

from metala_vision.errors import UserError
from metala_vision.files import check_outputs, write_text

MARK = "metala-vision probe unified"
HEAD = (
    "system", "f_q", "f_k", "f_v", "f_alpha", "f_g", "norm", "heads", "K", "V", "state, floats",
    "parameters / C^2", "query", "own key", "dynamic decay",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; imports nothing of torch."""
    parser.add_argument(
        "--update", type=Path, metavar="FILE",
        help=f"put the table into this file, between its marks <!-- {MARK} --> and <!-- end -->",
    )  # fmt: skip


def run(given: argparse.Namespace) -> int:
    """Print the table, or put it into a file.

    Raises:
        UserError: for a file without marks, or that cannot be written.
    """
    text = None
    if given.update is not None:
        text = read_marked(given.update, MARK)
        check_outputs({"--update": given.update})
    table = as_markdown()
    print(table)
    if given.update is not None and text is not None:
        write_text(given.update, between(text, MARK, table))
    return 0


def read_marked(path: Path, mark: str) -> str:
    """The text of a file that has the marks.

    Raises:
        UserError: naming the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise UserError(f"cannot read {path}: {why}") from error
    if f"<!-- {mark} -->\n" not in text or "<!-- end -->" not in text.split(f"<!-- {mark} -->")[1]:
        raise UserError(f"{path} has no line <!-- {mark} --> with a line <!-- end --> below it")
    return text


def between(text: str, mark: str, block: str) -> str:
    """The text with `block` in place of what stands between the mark and the next end."""
    before, after = text.split(f"<!-- {mark} -->\n", 1)
    return f"{before}<!-- {mark} -->\n\n{block}\n\n<!-- end -->{after.split('<!-- end -->', 1)[1]}"


def table(head: tuple[str, ...], rows: list[list[str]], left: int) -> str:
    """Markdown, the first `left` columns to the left."""
    aligned = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), aligned, *rows])


def as_markdown() -> str:
    """The table of every registered recurrence at the tiny size."""
    from .systems import classes, parameters, registered, state_floats, widths

    rows = []
    for system in registered():
        H, K, V, is_complex = widths(system)
        count = parameters(system)
        share = (sum(count.values()) - count["conv"]) / system.dim**2
        formulas = system.functions.formulas
        cells = [f"`{text}`" for text in formulas[:5]]
        rows.append([
            system.name, *cells, formulas[5], str(H),
            f"{K} complex" if is_complex else str(K), str(V), f"{state_floats(system):,}",
            f"{share:.2f}", *("yes" if own else "no" for own in classes(system)),
        ])  # fmt: skip
    return table(HEAD, rows, 7)

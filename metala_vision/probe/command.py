"""`metala-vision probe WHAT`: synthetic tasks, and what they show of the token mixers.

A probe is a module beside this one with add_arguments(parser), which imports nothing of torch, and
run(given), which returns the exit status.
"""

import argparse
from importlib import import_module

PROBES = {
    "unified": "the table of docs/unified.md: each gated mixer as five functions",
    "conditions": "dynamic memory, static approximation and least parameters of each gated mixer",
    "mqar": "multi-query associative recall: which mixers find again what they were told once",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every probe; imports nothing of torch."""
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text in PROBES.items():
        module = import_module(f".{name}", __package__)
        own = what.add_parser(
            name, help=text, description=module.__doc__, formatter_class=parser.formatter_class
        )
        module.add_arguments(own)
        own.set_defaults(run=module.run)


def run(given: argparse.Namespace) -> int:
    """The probe that the arguments name; its exit status."""
    return given.run(given)

"""The scripts of benchmarks/ as modules, and made-up results."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
HEADER = {
    "what": "made up", "device": "GPU X", "gpu": True, "dtype": "bfloat16",
    "versions": {"torch": "1"}, "commit": "abc", "sources": "def",
}  # fmt: skip


def load(name):
    """A script as a module; its neighbours are found as when it is run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

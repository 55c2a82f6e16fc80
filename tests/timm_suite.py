"""timm's own model tests over this package's models.

    python -m tests.timm_suite [NAME_FILTER] [pytest arguments]

The sources of the installed timm (its sdist carries the tests, its wheel does not) are fetched by
pip into a temporary folder, and tests/test_models.py runs with `list_models` reduced to our models,
all or those of NAME_FILTER (wildcards). They count as standard models: 4-D features, pool_size
checked. Tests of timm's that name a model of timm's are left out.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

ROOT = Path(__file__).parents[1]
OURS = "*"

# Read by pytest as a plugin before timm's tests are: they ask for their models while imported.
PLUGIN = '''
import os

import timm

import metala_vision

_all = timm.list_models
OURS = set(metala_vision.list_models(os.environ["TIMM_SUITE_FILTER"]))


def list_models(filter="", module="", **kwargs):
    """timm's, reduced to ours; a list of modules (of models with intermediates) means ours too.

    timm's lists of models that are not standard name its own EVA, eva_*, which would be ours too.
    """
    if not isinstance(filter, str):
        filter = [pattern for pattern in filter if pattern != "eva_*"]
    left_out = kwargs.pop("exclude_filters", "")
    if not isinstance(left_out, str):
        left_out = [pattern for pattern in left_out if pattern != "eva_*"]
    return [name for name in _all(filter, exclude_filters=left_out, **kwargs) if name in OURS]


timm.list_models = list_models


def pytest_collection_modifyitems(config, items):
    kept = [i for i in items if any(f"[{n}" in i.nodeid or f"-{n}" in i.nodeid for n in OURS)]
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    items[:] = kept
'''


def fetch(folder: Path) -> Path:
    """timm's tests folder, of the version that is installed."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", f"timm=={timm.__version__}", "--no-deps",
         "--no-binary", "timm", "--quiet", "--dest", str(folder)],
        check=True,
    )  # fmt: skip
    archive = next(folder.glob("timm-*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return next(folder.glob("timm-*/tests"))


def main() -> int:
    arguments = sys.argv[1:]
    name_filter = arguments.pop(0) if arguments and not arguments[0].startswith("-") else OURS
    with tempfile.TemporaryDirectory() as folder:
        tests = fetch(Path(folder))
        (Path(folder) / "only_ours.py").write_text(PLUGIN, encoding="utf-8")
        path = os.pathsep.join([folder, str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-m", "pytest", str(tests / "test_models.py"), "-p", "only_ours",
             "-q", "-W", "ignore", "-p", "no:cacheprovider", "--rootdir", str(tests), *arguments],
            env={**os.environ, "PYTHONPATH": path, "TIMM_SUITE_FILTER": name_filter},
            cwd=tests.parent, check=False,
        ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

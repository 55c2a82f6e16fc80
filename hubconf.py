"""torch.hub: `torch.hub.load(REPOSITORY, "metala_tiny", num_classes=10)`, arguments as in timm."""

# What is not a model is underscored: torch.hub lists every other callable.
import os as _os
import shutil as _shutil
import tempfile as _tempfile
from pathlib import Path as _Path

dependencies = ["torch", "timm"]

# torch.hub unpacks an archive in which a link is a small file with the link's target as its text.
_ROOT = _Path(__file__).parent
for _name in ("kernels", "configs"):
    _link = _ROOT / "metala_vision" / _name
    if _link.is_file():
        _copy = _tempfile.mkdtemp(dir=_ROOT)
        _shutil.copytree(_ROOT / _name, _copy, dirs_exist_ok=True)
        try:
            _link.unlink()
            _os.rename(_copy, _link)
        except OSError:  # another process was first
            _shutil.rmtree(_copy, ignore_errors=True)

import timm as _timm  # noqa: E402

import metala_vision as _metala_vision  # noqa: E402

globals().update({_name: _timm.model_entrypoint(_name) for _name in _metala_vision.list_models()})

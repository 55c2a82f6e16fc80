"""torch.hub: `torch.hub.load(REPOSITORY, "metala_tiny", num_classes=10)`, arguments as in timm."""

import shutil
from pathlib import Path

dependencies = ["torch", "timm"]

# torch.hub unpacks an archive in which a link is a small file with the link's target as its text.
_ROOT = Path(__file__).parent
for _name in ("kernels", "configs"):
    _link = _ROOT / "metala_vision" / _name
    if _link.is_file():
        _link.unlink()
        shutil.copytree(_ROOT / _name, _link)

import timm as _timm  # noqa: E402

from metala_vision.models import metala as _metala  # noqa: E402

globals().update({_name: getattr(_metala, _name) for _name in _timm.list_models(module="metala")})

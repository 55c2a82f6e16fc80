"""Vision backbones whose token mixer is a gated linear recurrence, as timm models.

`import metala_vision` registers them: afterwards `timm.create_model("metala_tiny")` works, and so
does `metala_vision.create_model`, which is timm's.
"""

from timm import create_model as create_model

from . import models as models
from ._version import __version__ as __version__
from .models import list_models as list_models

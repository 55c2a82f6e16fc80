"""Vision backbones whose token mixer is a gated linear recurrence, as timm models.

`import metala_vision` registers them: afterwards `timm.create_model("metala_tiny")` works.
"""

from . import models  # noqa: F401  (registers the models)

__version__ = "0.1.0"

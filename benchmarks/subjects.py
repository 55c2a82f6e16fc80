"""What is measured, by the names that stand in the files of results."""

from metala_vision.models import FAMILIES

# Operators: tokens, batch and heads of each shape, about as many tokens in each; the shapes that
# the goals name come first.
SHAPES = [(196, 128, 3), (4096, 8, 3), (16384, 2, 3), (1024, 32, 3), (64, 256, 2)]
FORMS = ("ours", "chunk_gla", "sdpa", "chunked")

# Whole models.
TRAINING, INFERENCE = "training step", "inference"
OURS, DEIT = "metala_tiny", "deit_tiny_patch16_224"
SMALL = ("metala_small", "deit_small_patch16_224")
COMPARATORS = tuple(f"{family}_tiny" for family in FAMILIES if family != "metala")
BATCHES = {224: 256, 512: 64, 1024: 16, 2048: 4}  # of each size, about as many tokens in each

"""What all trainings of associative recall in one folder have in common."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RecallSettings:
    """Data, length of the training and shape of the model; the defaults are MetaLA's section 6.

    stop_at: the test accuracy above which training ends. conv: see mqar_model.conv_of.
    """

    vocab: int = 8192
    power: float = 0.01
    random_non_queries: bool = False
    train_examples: int = 100_000
    test_examples: int = 3_000
    epochs: int = 64
    stop_at: float = 0.99
    weight_decay: float = 0.1
    dropout: float = 0.1
    num_heads: int = 2
    layers: int = 2
    mlp_ratio: float | None = None
    conv: str = "published"
    precision: str = "no"

"""The choice of implementation, the same for every operator."""

from collections.abc import Sequence

# Implementations that an operator may offer; "auto" is resolved by `choose` and is none itself.
IMPLS = ("auto", "triton", "chunked", "portable", "reference")


def choose(impl: str, available: Sequence[str]) -> str:
    """Name the implementation that `impl` stands for among those `available`.

    "auto" takes the first available one. Any other name is obeyed or refused, never replaced.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is unknown; accepted: {', '.join(IMPLS)}")
    if impl == "auto":
        return available[0]
    if impl not in available:
        raise ValueError(
            f"impl={impl!r} is not available here; accepted: auto, {', '.join(available)}"
        )
    return impl

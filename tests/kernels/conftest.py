"""What the tests of kernels share."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nothing has written yet is NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def filled(*args, _make=make, **options):
            x = _make(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() and x.numel() else x

        monkeypatch.setattr(owner, name, filled)

"""Fixtures that every room's tests share."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real():
    """The embedded real model, loaded once: weights packed, float32.

    The first call on a machine fetches it (about 100 MB).
    """
    from specref.lm import zoo

    return zoo.load("smollm2-135m")

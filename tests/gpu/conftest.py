"""Processes of one run share the device."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    """What torch keeps for later would be out of the other processes' reach."""
    yield
    torch.cuda.empty_cache()

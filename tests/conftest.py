from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Two threads are what the smallest machine has; examples are drawn alike in every run.
torch.set_num_threads(2)
settings.register_profile("default", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

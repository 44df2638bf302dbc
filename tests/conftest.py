"""What all tests share."""

import pytest
import torch
from hypothesis import settings

# Tests are small: threads that wait for each other on a busy machine cost more than they save.
torch.set_num_threads(1)
# Examples are drawn alike in every run.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

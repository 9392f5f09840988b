"""Every test draws from a torch generator of its own seed, on one thread."""

import pytest
import torch

# The matrices are small: threads that wait for each other only cost time.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same state of torch's global generator."""
    torch.manual_seed(0)

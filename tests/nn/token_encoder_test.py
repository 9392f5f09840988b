"""Invariants of the token encoder's parts."""

from typing import Any

import pytest
import torch

from sbi_slotflow import problems


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_blocks_convolve_as_torch_does(place: int, batch: int) -> None:
    torch.manual_seed(place)
    encoder = problems.spikes(num_samples=64).build_token_encoder(width=8)
    block: Any = encoder.blocks[place]
    tokens = torch.randn(batch, 21, 8)
    around = block.convolution(block.norm(tokens).mT).mT
    expected = tokens + block.mix(around)
    assert torch.allclose(block(tokens), expected, atol=1e-6)

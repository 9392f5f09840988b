"""Densities of torch's distributions where torch's own are wrong."""

import torch
from torch.distributions import AffineTransform, LogNormal, Normal, SigmoidTransform
from torch.distributions import TransformedDistribution as Transformed

from sbi_slotflow.sets.laws import log_density


def test_transformed_variables_have_no_density_outside_the_images() -> None:
    logit_normal = Transformed(
        Normal(torch.zeros(1), torch.ones(1)),
        [SigmoidTransform(), AffineTransform(1.0, 2.0)],  # between 1 and 3
        validate_args=False,
    )
    found = log_density(logit_normal, torch.tensor([[0.9], [2.0], [3.1]]))
    assert found.isneginf().tolist() == [True, False, True]
    log_normal = LogNormal(torch.zeros(1), torch.ones(1), validate_args=False)
    assert log_density(log_normal, torch.tensor([[-1.0]])).isneginf().all()

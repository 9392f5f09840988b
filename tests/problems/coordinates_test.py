"""Where components are: places of every class and back."""

import torch
from two_classes import problem_of

from sbi_slotflow import WhiteNoise
from sbi_slotflow.problems.marginal_likelihood import Target


def test_coordinates_keep_class_and_what_a_class_has_not() -> None:
    problem = problem_of(0.5, [1, 1, 1], [1, 1])
    form = problem.linear_form()
    assert form is not None
    x = torch.zeros(64, dtype=torch.float64)
    target = Target(problem.prior, form, WhiteNoise(0.5), x)
    rows = problem.prior.with_cardinality([0, 0, 0, 1]).sample((20,)).double()
    components = problem.layout.unpack(rows).components
    u = target.coordinates.fractions(form.nonlinear(components))
    assert (u > 0).all()
    assert (u < 1).all()
    assert target.coordinates.label(u)[0].tolist() == [0, 0, 1]
    place = target.coordinates.place(u)
    again = form.components(place, form.amplitudes(components))
    torch.testing.assert_close(again, components)
    amplitudes = form.amplitudes(components)
    signal = torch.einsum("ckm,ckmt->ckt", amplitudes, target.signals(u))
    torch.testing.assert_close(signal, form.signals(components))
    # what cannot be moved has no slope
    slopes = target.derivatives(u[0], amplitudes[0])
    fixed = ~target.coordinates.free[target.coordinates.label(u[0])]
    assert fixed.sum(-1).tolist() == [2, 2, 1]  # the class, and a rate
    assert (slopes[fixed] == 0).all()
    assert (slopes[~fixed].norm(dim=-1) > 0).all()

r"""Components that are linear in some of their parameters, given the others.

.. math::
    s(\theta) = \sum_{m=1}^{M} a_m\, b_m(\nu),
    \qquad \theta \leftrightarrow (\nu, a)

nu are the nonlinear parameters (a place, a width, a period), a the amplitudes. Nearly
every field has such components: a pulse is linear in its height, a star in its flux, a
sinusoid or a Keplerian orbit in amplitude times cosine and sine of its phase. With
Gaussian noise, amplitudes can then be integrated out in closed form, which is what
the collapsed sampler (:mod:`sbi_slotflow.problems.collapsed`) lives on.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..sets.classes import ClassLayout
from ..sets.layout import ThetaLayout

__all__ = ["ClassForm", "LinearForm", "PolarForm"]

# Relative difference to the signal above which a form is not one.
_TOLERANCE = 1e-5


class LinearForm:
    """Components whose amplitudes are some of their parameters.

    The basis is the component signal itself at unit amplitudes.

    Args:
        signal: Maps components ``(..., D)`` to signals ``(..., T)``.
        layout: Layout of theta.
        linear: Names of the M parameters in which the signal is linear.

    Raises:
        ValueError: If a name is unknown, or no parameter or all are linear.

    Example:
        >>> from sbi_slotflow import problems
        >>> problem = problems.spikes()
        >>> signal = problem.simulator.component_signal
        >>> form = LinearForm(signal, problem.layout, ["amplitude"])
        >>> components = torch.tensor([[0.3, 0.01, 1.5], [0.6, 0.02, 0.7]])
        >>> form.basis(form.nonlinear(components)).shape
        torch.Size([2, 1, 512])
    """

    def __init__(
        self,
        signal: Callable[[Tensor], Tensor],
        layout: ThetaLayout,
        linear: Sequence[str],
    ) -> None:
        names = layout.component_names
        known = set(linear) <= set(names) and len(set(linear)) == len(linear)
        if not known or not 0 < len(linear) < len(names):
            raise ValueError(
                "linear must name some but not all of the component's parameters "
                f"{names}, each once, got {tuple(linear)}."
            )
        self.signal, self.layout = signal, layout
        self.linear = [names.index(name) for name in linear]
        self.others = [i for i in range(len(names)) if i not in self.linear]

    @property
    def members(self) -> "list[LinearForm]":
        """The form of each class; the form itself where there is one class."""
        return [self]

    @property
    def num_amplitudes(self) -> int:
        """Number M of amplitudes."""
        return len(self.linear)

    def nonlinear(self, components: Tensor) -> Tensor:
        """The nonlinear parameters ``(..., N)`` of components ``(..., D)``."""
        return components[..., self.others]

    def amplitudes(self, components: Tensor) -> Tensor:
        """The amplitudes ``(..., M)`` of components ``(..., D)``."""
        return components[..., self.linear]

    def components(self, nonlinear: Tensor, amplitudes: Tensor) -> Tensor:
        """Components ``(..., D)`` of both, the inverse of the two above."""
        return self._joined(nonlinear, amplitudes)

    def log_det(self, components: Tensor) -> Tensor:
        """Log Jacobian of the amplitudes by the linear parameters, shape ``(...)``."""
        return torch.zeros_like(components[..., 0])

    def basis(self, nonlinear: Tensor) -> Tensor:
        """Signals ``(..., M, T)`` of unit amplitudes, of parameters ``(..., N)``."""
        units = torch.eye(self.num_amplitudes).to(nonlinear)
        each = nonlinear.unsqueeze(-2).expand(*nonlinear.shape[:-1], len(units), -1)
        components = self.components(each, units.expand(*each.shape[:-1], -1))
        return self.signals(components)

    def check(self, components: Tensor) -> None:
        """Compare the form with the signal of some components ``(S, D)``.

        Raises:
            ValueError: If the signal is not linear in the amplitudes.
        """
        signal = self.signals(components)
        basis = self.basis(self.nonlinear(components))
        error = signal - torch.einsum("sm,smt->st", self.amplitudes(components), basis)
        if error.norm() > _TOLERANCE * signal.norm():
            names = [self.layout.component_names[i] for i in self.linear]
            raise ValueError(
                f"the component signal must be linear in {names}, got one that differs "
                f"by {float(error.norm() / signal.norm()):.2g} of itself."
            )

    def signals(self, components: Tensor) -> Tensor:
        """Signals ``(..., T)`` of components ``(..., D)``, events side by side."""
        signals = torch.as_tensor(self.signal(components)).to(components)
        return signals.flatten(components.ndim - 1)

    def _joined(self, nonlinear: Tensor, linear: Tensor) -> Tensor:
        size = len(self.others) + len(self.linear)
        components = nonlinear.new_empty(*nonlinear.shape[:-1], size)
        components[..., self.others] = nonlinear
        components[..., self.linear] = linear.to(nonlinear)
        return components


class PolarForm(LinearForm):
    r"""Components with an amplitude A and a phase phi: linear in A cos phi, A sin phi.

    Args:
        signal: Maps components ``(..., D)`` to signals ``(..., T)``.
        layout: Layout of theta.
        linear: Names of A and phi, in this order.
        start: Where phases start: they lie between that and 2 pi more.

    The Jacobian is :math:`|\partial (a, b) / \partial (A, \phi)| = A`.
    """

    def __init__(
        self,
        signal: Callable[[Tensor], Tensor],
        layout: ThetaLayout,
        linear: Sequence[str],
        start: float = 0.0,
    ) -> None:
        super().__init__(signal, layout, linear)
        self.start = start

    def amplitudes(self, components: Tensor) -> Tensor:
        """A cos phi and A sin phi, shape ``(..., 2)``."""
        radius, angle = super().amplitudes(components).unbind(-1)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    def components(self, nonlinear: Tensor, amplitudes: Tensor) -> Tensor:
        """Components ``(..., D)``."""
        a, b = amplitudes.unbind(-1)
        angle = (torch.atan2(b, a) - self.start) % (2 * torch.pi) + self.start
        return self._joined(nonlinear, torch.stack([torch.hypot(a, b), angle], -1))

    def log_det(self, components: Tensor) -> Tensor:
        """Log A, shape ``(...)``."""
        return components[..., self.linear[0]].log()


class ClassForm(LinearForm):
    """Components of several classes, each of them linear in parameters of its own.

    The first nonlinear parameter is the component's class. Parameters and amplitudes
    that a class has fewer are zero.

    Args:
        signal: Maps components ``(..., D)``, whose first entry is their class, to
            signals ``(..., T)``.
        layout: Layout of all classes.
        members: The form of each class, in order.
    """

    def __init__(
        self,
        signal: Callable[[Tensor], Tensor],
        layout: ClassLayout,
        members: Sequence[LinearForm],
    ) -> None:
        self.signal, self.layout, self._members = signal, layout, list(members)
        self._num_nonlinear = 1 + max(len(form.others) for form in members)

    @property
    def members(self) -> list[LinearForm]:
        """The form of each class."""
        return self._members

    @property
    def num_amplitudes(self) -> int:
        """Number M of amplitudes, the largest of all classes."""
        return max(form.num_amplitudes for form in self.members)

    def nonlinear(self, components: Tensor) -> Tensor:
        """Class and nonlinear parameters ``(..., N)`` of components ``(..., D)``."""
        found = components.new_zeros(*components.shape[:-1], self._num_nonlinear)
        found[..., 0] = components[..., 0]
        for c, rows, own in self._each(components):
            values = self.members[c].nonlinear(own)
            found[..., 1 : 1 + values.shape[-1]][rows] = values
        return found

    def amplitudes(self, components: Tensor) -> Tensor:
        """The amplitudes ``(..., M)`` of components ``(..., D)``."""
        found = components.new_zeros(*components.shape[:-1], self.num_amplitudes)
        for c, rows, own in self._each(components):
            values = self.members[c].amplitudes(own)
            found[..., : values.shape[-1]][rows] = values
        return found

    def components(self, nonlinear: Tensor, amplitudes: Tensor) -> Tensor:
        """Components ``(..., D)`` of both, the inverse of the two above."""
        width = self.layout.num_component_params
        found = nonlinear.new_zeros(*nonlinear.shape[:-1], width)
        for c, form in enumerate(self.members):
            rows = nonlinear[..., 0] == c
            own = form.components(
                nonlinear[rows][..., 1 : 1 + len(form.others)],
                amplitudes[rows][..., : form.num_amplitudes],
            )
            found[rows] = self._classes.from_class(own, c)
        return found

    def log_det(self, components: Tensor) -> Tensor:
        """Log Jacobian of the amplitudes by the linear parameters, shape ``(...)``."""
        found = torch.zeros_like(components[..., 0])
        for c, rows, own in self._each(components):
            found[rows] = self.members[c].log_det(own)
        return found

    def basis(self, nonlinear: Tensor) -> Tensor:
        """Signals ``(..., M, T)`` of unit amplitudes, of parameters ``(..., N)``."""
        found = None
        for c, form in enumerate(self.members):
            rows = nonlinear[..., 0] == c
            if not rows.any():  # a signal need not know of no components
                continue
            own = form.basis(nonlinear[rows][..., 1 : 1 + len(form.others)])
            if found is None:
                size = self.num_amplitudes, own.shape[-1]
                found = own.new_zeros(*nonlinear.shape[:-1], *size)
            found[..., : form.num_amplitudes, :][rows] = own
        assert found is not None, "no components"
        return found

    def check(self, components: Tensor) -> None:
        """Compare each class's form with its signal; see the base."""
        for c, _, own in self._each(components):
            if len(own):
                self.members[c].check(own)

    @property
    def _classes(self) -> ClassLayout:
        assert isinstance(self.layout, ClassLayout)
        return self.layout

    def _each(self, components: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each class its number, where it is, and its own parameters there."""
        for c in range(len(self.members)):
            rows = components[..., 0] == c
            yield c, rows, self._classes.to_class(components[rows], c)

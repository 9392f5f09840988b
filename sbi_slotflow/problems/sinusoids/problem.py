r"""Sinusoids in white noise, seen in a long and a short record.

.. math::
    x(t) = \sum_{k=1}^{K} A_k \cos(2\pi f_k t + \phi_k) + \epsilon, \qquad
    \epsilon \sim N(0, \sigma^2)

x holds the long record, then the short one; both start at t = 0. theta is
[K, sigma, (A, phi, f)_1, ..., (A, phi, f)_Kmax], ascending in f.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from sbi.utils import MultipleIndependent
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from ...nn.cells import CellAxis
from ...nn.charts import Chart
from ...nn.encoders import TokenEncoder
from ...nn.paper import DualStreamEncoder
from ...sets.checks import Numbers, as_floats
from ...sets.prior import VariableKPrior
from ..base import Likelihood, Problem, Stream, log_uniform, uniform
from ..least_squares import additive_fit
from ..linear import PolarForm
from ..simulator import AdditiveSimulator, NoiseModel, WhiteNoise
from .fit import SineFit, SineStatistics
from .grid import Grid, SineSignal
from .polar import PolarChart
from .tokens import BandTokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Oscillations", "ResampledNoise", "Sinusoids", "sinusoids"]

# Rows above which tabulating an observation's statistics pays.
_MANY_ROWS = 100

Preset = Literal["tiny", "paper", "crowded"]


@dataclass(frozen=True)
class _Setup:
    """Numbers of one preset."""

    cardinalities: range
    amplitude: tuple[float, float]
    log_amplitude: bool
    frequency: tuple[float, float]
    sigma: tuple[float, float]
    separation: float | None
    grids: tuple[Grid, ...]

    @property
    def weights(self) -> list[float]:
        """Uniform weights of K = 0..Kmax."""
        most = self.cardinalities[-1]
        return [float(k in self.cardinalities) for k in range(most + 1)]


_LONG, _SHORT = Grid(300.0, 10.0), Grid(10.0, 512.0)
_SETUPS: dict[str, _Setup] = {
    "tiny": _Setup(
        range(4), (0.5, 1.5), False, (0.5, 2.0), (0.1, 1.0), 0.1,
        (Grid(20.0, 10.0), Grid(2.0, 50.0)),
    ),
    "paper": _Setup(
        range(1, 11), (0.5, 1.5), False, (2.5, 3.0), (0.0, 1.5), 0.01, (_LONG, _SHORT)
    ),
    "crowded": _Setup(
        range(11), (0.05, 1.5), True, (2.5, 3.0), (0.3, 1.5), None, (_LONG, _SHORT)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Oscillations(Problem):
    """A problem of components (A, phi, f) in records on regular time grids.

    Attributes:
        grids: Time grids of the records, the longest first.
    """

    grids: tuple[Grid, ...]

    analytic: ClassVar[bool] = False  # whether the data are complex

    @property
    def band(self) -> tuple[float, float]:
        """Lowest and highest frequency."""
        return self.prior.component_marginals[2].bounds

    @property
    def reference_time(self) -> float:
        """Middle of the long record, where the encoder's spectrum shows phases."""
        return 0.5 * self.grids[0].duration

    def build_token_encoder(
        self, pursuit: bool = False, **options: Any
    ) -> TokenEncoder:
        """Return a :class:`TokenEncoder` with a token for each cell of the band.

        Args:
            pursuit: Whether components are first found by matching pursuit, which
                pays where the cardinality is uncertain.
            options: Options of the encoder.
        """
        front_end = BandTokens(
            [grid.num_samples for grid in self.grids],
            [grid.rate for grid in self.grids],
            self.band,
            self.location_axis().num_cells,
            self.layout.max_cardinality if pursuit else 0,
            self.analytic,
        )
        return TokenEncoder(front_end, **options)

    def location_axis(self) -> CellAxis:
        """Frequency, in cells of the long record's resolution."""
        width = self.band[1] - self.band[0]
        cells = max(1, round(width * self.grids[0].duration))
        return CellAxis(2, cells, (self.prior.min_separation or 0.0) * cells / width)

    def build_fit(self) -> Any:
        """Return the least squares of sinusoids."""
        return SineFit(self.grids)

    def build_chart(self) -> Chart:
        """Return a :class:`PolarChart` with phases at the :attr:`reference_time`."""
        return PolarChart(
            self.prior.component_marginals,
            amplitude=0,
            phase=1,
            frequency=2,
            reference_time=self.reference_time,
        )


@dataclass(frozen=True)
class Sinusoids(Oscillations):
    """A sinusoid problem, see :func:`sinusoids`."""

    simulator: AdditiveSimulator

    @property
    def is_plain(self) -> bool:
        """Whether closed forms hold, as noise is white and nothing lies beneath."""
        white = isinstance(self.simulator.noise, WhiteNoise)
        return white and self.simulator.background is None

    @property
    def log_likelihood(self) -> Likelihood:
        """Log p(x | theta); of white noise from :class:`SineStatistics` if it pays."""
        if self.is_plain:
            return SineLikelihood(self.simulator, self)
        return Likelihood(self.simulator)

    def build_fit(self) -> Any:
        """Return the least squares of sinusoids.

        By closed forms in white noise, else by derivatives of the signal where noise is
        white and a linear background gone; None, with a warning, where that cannot be.
        """
        resampled = isinstance(self.simulator.noise, ResampledNoise)
        if self.is_plain or (resampled and self.simulator.background is None):
            return super().build_fit()
        form = self.linear_form()
        fit = additive_fit(self.simulator, self.prior, self.layout.order_by, form)
        whole = fit is None or fit.space is not None
        return fit if whole else super().build_fit()

    def statistics(self, x: Numbers) -> SineStatistics:
        """Tabulate the statistics of one observation, ``(T,)`` or ``(1, T)``."""
        x = self.simulator.checked_data(x)
        if x.numel() != self.num_data or x.ndim > 2:
            raise ValueError(
                f"x must have shape ({self.num_data},) or (1, {self.num_data}), got "
                f"{tuple(x.shape)}."
            )
        frequency = self.prior.component_marginals[2]
        if not all(math.isfinite(bound) for bound in frequency.bounds):
            raise ValueError(
                f"the prior's frequency must have bounds, got a {frequency}."
            )
        data = x.detach().reshape(-1).cpu().double().numpy()
        return SineStatistics.of(data, self.grids, self.band)

    @property
    def units(self) -> dict[str, str]:
        """Units of parameters by name."""
        return {"phase": "rad", "frequency": "Hz"}

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The records, with times in seconds."""
        return tuple(
            Stream(
                grid.times.numpy(),
                f"stream {number} ({grid.duration:g} s at {grid.rate:g} Hz)",
                "time (s)",
            )
            for number, grid in enumerate(self.grids, 1)
        )

    def linear_form(self) -> PolarForm:
        """Return the signal as linear in A cos phi and A sin phi."""
        names, start = ("amplitude", "phase"), self.prior.component_marginals[1].bounds
        return PolarForm(self.simulator.component_signal, self.layout, names, start[0])

    def collapsed(self, x: Tensor, *, general: bool = False, **options: Any) -> Any:
        """Draw from the exact posterior of one observation.

        ``general`` takes the sampler of any linear form instead, which reads the
        signals themselves and is slower.
        """
        if general or not self.is_plain:
            return super().collapsed(x, **options)
        from .collapsed import collapsed

        return collapsed(self.prior, *self._tabulated(x), **options)

    def laplace_proposal(self, x: Tensor, **options: Any) -> Any:
        """Approximate the posterior without a network; see :mod:`.laplace`."""
        from .laplace import laplace_proposal

        statistics, x = self._tabulated(x)
        return laplace_proposal(self, x, statistics, **options)

    def _tabulated(self, x: Numbers) -> tuple[SineStatistics, Tensor]:
        """Statistics of x for samplers of white noise, and x as floats."""
        if self.noise_level is None or not self.is_plain:
            raise TypeError(
                "problem must be a sinusoid problem with white noise of unknown level "
                f"and no background, got {self.name!r} with {self.simulator.noise}."
            )
        return self.statistics(x), as_floats(x, "x")

    def plot_spectrum(
        self, samples: Tensor, x: Tensor, true_theta: Tensor | None = None
    ) -> "Figure":
        """Plot spectrum and posterior; see :mod:`.spectrum_plot`."""
        from .spectrum_plot import plot_spectrum

        return plot_spectrum(self, self.grids[0].rate, samples, x, true_theta)

    def build_encoder(self, **options: Any) -> nn.Module:
        """Return a :class:`DualStreamEncoder`, small unless ``options`` say otherwise.

        The longest record's spectrum is cut to the band and kept at full resolution,
        others are read in time and strided down to about 25 positions.
        """
        long, *others = self.grids
        low, high = self.band
        margin = 0.1 * (high - low)
        first = max(0, math.floor((low - margin) * long.duration))
        last = min(long.num_samples // 2, math.ceil((high + margin) * long.duration))
        each = [max(1, round((g.num_samples / 25) ** (1 / 3))) for g in others]
        small: dict[str, Any] = {
            "domains": ("frequency", *["time"] * len(others)),
            "channels": (32, 48, 64),
            "kernels": (5, 5, 3),
            "strides": ((1, 1, 1), *[(stride, stride, stride) for stride in each]),
            "hidden_features": 128,
            "residual": True,
            "centre_phase": True,
            "bands": ((first, last), *[None] * len(others)),
        }
        lengths = [grid.num_samples for grid in self.grids]
        return DualStreamEncoder(lengths, **{**small, **options})


@dataclass(frozen=True)
class SineLikelihood(Likelihood):
    """Likelihood of sinusoids in white noise.

    Statistics that are tabulated once make the cost of a row independent of the
    record's length. A call does so for many rows, :meth:`given` in any case.
    """

    simulator: AdditiveSimulator
    problem: Sinusoids

    def __call__(self, theta: Tensor, x: Numbers) -> Tensor:
        """Evaluate log p(x | theta); see :meth:`AdditiveSimulator.log_likelihood`."""
        x = self.simulator.checked_data(x)
        num = theta.shape[:-1].numel() // max(1, x.shape[:-1].numel())
        if num < _MANY_ROWS or not _match(theta, x):
            return self.simulator.log_likelihood(theta, x)
        return self.given(x)(theta)

    def given(self, x: Numbers) -> Callable[[Tensor], Tensor]:
        """Log p(x | theta) as a function of theta alone; see :class:`Likelihood`."""
        x = self.simulator.checked_data(x)
        layout, noise = self.problem.layout, self.simulator.noise
        tables = [self.problem.statistics(one) for one in torch.atleast_2d(x)]
        assert isinstance(noise, WhiteNoise)

        def log_likelihood(theta: Tensor) -> Tensor:
            if not _match(theta, x):
                return self.simulator.log_likelihood(theta, x)
            layout.validate(theta)
            if len(tables) == 1:
                return tables[0].log_likelihood_of(theta, layout, noise)
            pairs = zip(tables, theta.unbind(1), strict=True)
            values = [one.log_likelihood_of(rows, layout, noise) for one, rows in pairs]
            return torch.stack(values, 1)

        return log_likelihood


def _match(theta: Tensor, x: Tensor) -> bool:
    """Whether rows are of one observation, or rows ``(S, B, E)`` of B of them."""
    if x.ndim == 1 or (x.ndim == 2 and len(x) == 1):
        return x.ndim == 1 or theta.ndim > 1
    return x.ndim == 2 and theta.ndim == 3 and theta.shape[1] == len(x)


def sinusoids(
    preset: Preset = "tiny",
    *,
    noise: Literal["white", "resampled"] | NoiseModel = "white",
    cardinality: Sequence[float] | None = None,
    amplitude: Sequence[float] | None = None,
    frequency: Sequence[float] | None = None,
    sigma: Sequence[float] | float | None = None,
    separation: float | None = None,
    grids: Sequence[Grid] | Grid | None = None,
    shared: Distribution | None = None,
    shared_names: Sequence[str] | None = None,
    background: Callable[[Tensor], Tensor] | None = None,
) -> Sinusoids:
    """Make a sinusoid problem.

    ==========  =====  ================  ===========  ==========  =========
    preset      K      A                 f (Hz)       separation  sigma
    ==========  =====  ================  ===========  ==========  =========
    tiny        0..3   0.5-1.5           0.5-2.0      0.1 Hz      0.1-1.0
    paper       1..10  0.5-1.5           2.5-3.0      0.01 Hz     0-1.5
    crowded     0..10  0.05-1.5, log     2.5-3.0      none        0.3-1.5
    ==========  =====  ================  ===========  ==========  =========

    ``tiny`` has 20 s at 10 Hz and 2 s at 50 Hz, the others 300 s at 10 Hz and 10 s at
    512 Hz. K is uniform, phases are uniform on [0, 2 pi).

    A problem of your own starts from the preset that is most like it and changes what
    is not, the units of time and amplitude included::

        sinusoids("crowded", grids=[Grid(600.0, 1.0)], frequency=(0.01, 0.49))

    Args:
        preset: Name of the preset.
        noise: ``"white"`` is exact: independent on all grids with standard deviation
            sigma. ``"resampled"`` is :class:`ResampledNoise`, without a likelihood. A
            noise model, such as :class:`~sbi_slotflow.GaussianNoise` with errors or a
            spectrum, is one of all records side by side.
        cardinality: Weights of K = 0..Kmax.
        amplitude: Least and largest amplitude, with the preset's kind of prior.
        frequency: Ends of the band, below half the rate of every grid.
        sigma: Least and largest noise level, or the level if it is known: then it is
            no parameter.
        separation: Least gap between frequencies; 0 for none.
        grids: Time grids of the records, the longest first; or the only one.
        shared: Prior of all shared parameters, in place of sigma's alone: those that a
            noise model or a background reads.
        shared_names: Names of these.
        background: What shared parameters add to the signal; see
            :class:`~sbi_slotflow.AdditiveSimulator`.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the preset or the noise is unknown, an interval is none, or the
            band does not fit the grids.
    """
    if preset not in _SETUPS:
        raise ValueError(f"preset must be one of {sorted(_SETUPS)}, got {preset!r}.")
    setup, shared_given = _SETUPS[preset], shared
    if isinstance(grids, Grid):
        grids = (grids,)
    known = isinstance(sigma, Real)
    given = {
        "amplitude": _interval("amplitude", amplitude),
        "frequency": _interval("frequency", frequency),
        "sigma": _interval("sigma", (sigma, sigma) if known else sigma),
        "separation": separation,
        "grids": None if grids is None else tuple(grids),
    }
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    setup = replace(setup, **changes)
    if changes:
        _check_setup(setup, known)
    law = log_uniform if setup.log_amplitude else uniform
    phase = uniform(0.0, 2 * math.pi)
    if shared is None and not known:
        shared = Independent(uniform(*setup.sigma), 1)
        shared_names = ("sigma",) if shared_names is None else shared_names
    parts = [law(*setup.amplitude), phase, uniform(*setup.frequency)]
    prior = VariableKPrior(
        MultipleIndependent(parts, validate_args=False),
        setup.weights if cardinality is None else cardinality,
        shared=shared,
        min_separation=setup.separation,
        order_by=2,
        component_names=("amplitude", "phase", "frequency"),
        shared_names=shared_names,
        periods={"phase": 2 * math.pi},
    )
    models: dict[str, NoiseModel] = {
        "white": WhiteNoise(setup.sigma[0] if known else None),
        "resampled": ResampledNoise(setup.grids),
    }
    if isinstance(noise, str):
        if noise not in models:
            raise ValueError(
                f"noise must be one of {sorted(models)} or a noise model, got "
                f"{noise!r}."
            )
        if known and noise == "resampled":
            raise ValueError(
                f"sigma must be a range if noise is {noise!r}, got {sigma}."
            )
        model = models[noise]
    else:
        if not callable(getattr(noise, "log_prob", None)):
            raise TypeError(
                "noise must be a name or a noise model with sample and log_prob, got "
                f"{type(noise).__name__}."
            )
        if getattr(noise, "kind", "") == "spectrum" and len(setup.grids) > 1:
            raise ValueError(
                "noise must not be a spectrum where there are several records, got "
                f"{len(setup.grids)}: pass one grid, grids=Grid(duration, rate), or "
                "errors or a covariance of all records one after the other."
            )
        model = noise
    signal = SineSignal(setup.grids)
    simulator = AdditiveSimulator(signal, model, prior.layout, background=background)
    own = bool(changes) or any(
        part is not None for part in (cardinality, shared_given, background)
    )
    own = own or not isinstance(noise, str)
    name = "sinusoids" if own else f"sinusoids-{preset}"
    return Sinusoids(name, prior, simulator, setup.grids)


@dataclass(frozen=True)
class ResampledNoise:
    """Noise drawn once on a fine grid and interpolated onto each record's times.

    This is how the paper's training data were made. Linear interpolation shrinks the
    standard deviation to between 0.71 and 1 sigma, depending on the sample (0.82 in
    the mean square), colours the noise and correlates the two records, so there is no
    simple likelihood. The fine grid's rate is the fastest record's over the square root
    of two, which shares no step with either record. The first shared parameter is
    sigma.
    """

    grids: tuple[Grid, ...]

    def sample(
        self, signal: Tensor, shared: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw noise of the shape of ``signal`` (B, T)."""
        duration = max(grid.duration for grid in self.grids)
        rate = max(grid.rate for grid in self.grids) / math.sqrt(2)
        num = round(duration * rate)
        fine = signal.new_empty(len(signal), num).normal_(generator=generator)
        streams = []
        for grid in self.grids:
            position = grid.times.to(signal.device) / duration * (num - 1)
            left = position.floor().long().clamp(max=num - 2)
            weight = (position - left).to(signal)
            streams.append(fine[:, left] * (1 - weight) + fine[:, left + 1] * weight)
        return torch.cat(streams, dim=-1) * shared[..., :1]

    def log_prob(self, residual: Tensor, shared: Tensor) -> Tensor:
        """Raise NotImplementedError: interpolated noise has no simple likelihood."""
        raise NotImplementedError(
            'noise="resampled" has no likelihood; use noise="white" to get one.'
        )


def _interval(name: str, value: Any) -> tuple[float, float] | None:
    """A range as two floats, whatever holds them."""
    if value is None:
        return None
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        kinds = "a number or " if name == "sigma" else ""
        raise TypeError(
            f"{name} must be {kinds}(least, largest), got {value!r}."
        ) from None
    return low, high


def _check_setup(setup: _Setup, known: bool) -> None:
    """Check what a preset was changed to."""
    for name in ("amplitude", "frequency", "sigma"):
        low, high = getattr(setup, name)
        if name == "sigma" and known:
            if not 0 < low < math.inf:
                raise ValueError(f"sigma must be positive and finite, got {low}.")
            continue
        positive = name == "amplitude" and setup.log_amplitude
        if not 0.0 <= low < high < math.inf or (positive and not low):
            raise ValueError(
                f"{name} must be (least, largest) with 0 <= least < largest"
                f"{' and least > 0' if positive else ''}, got {(low, high)}."
            )
    strange = [type(g).__name__ for g in setup.grids if not isinstance(g, Grid)]
    if strange:
        raise TypeError(f"grids must be a Grid or several, got {strange[0]}.")
    if not setup.grids:
        raise ValueError("grids must hold at least one time grid, got none.")
    durations = [grid.duration for grid in setup.grids]
    if durations[0] != max(durations):
        raise ValueError(f"grids must have the longest first, got {durations}.")
    slowest = min(grid.rate for grid in setup.grids)
    if setup.frequency[1] > 0.5 * slowest:
        raise ValueError(
            f"frequency must end at or below {0.5 * slowest:g}, half the lowest rate "
            f"of the grids, got {setup.frequency}."
        )

"""Figures hold what they should for every K and leave matplotlib's state alone."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from matplotlib.text import Annotation
from torch import Tensor

from sbi_slotflow import ThetaLayout, plots
from sbi_slotflow.plots.corner import Column
from sbi_slotflow.problems import linear_gaussian, sinusoids
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.sets.circular import unwrap

TINY = sinusoids("tiny")
LAYOUT = TINY.layout
PERIODS = {"phase": 2 * math.pi}


def make_posterior(k: int, num: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """A true row with K = k, its data, and draws scattered around it."""
    weights = [float(i == k) for i in range(LAYOUT.max_cardinality + 1)]
    truth = TINY.prior.with_cardinality(weights).sample((1,), generator_for(0, k))
    x = TINY.simulator(truth, generator_for(1, k))
    parts = LAYOUT.unpack(truth.expand(num, -1))
    scales = torch.tensor([0.05, 0.15, 0.005])
    shape = parts.components.shape
    noise = torch.randn(shape, generator=generator_for(2, k)) * scales
    noisy = torch.randn((num, 1), generator=generator_for(3, k)) * 0.02
    components = parts.components + noise
    rows = LAYOUT.pack(parts.cardinality, components, parts.shared + noisy)
    return truth, x, LAYOUT.canonical(rows)


def labels(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return [text.get_text() for item in legends if item for text in item.get_texts()]


def annotations(figure: Figure) -> list[str]:
    """The corner plot's axis labels, left ones too."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_reconstruction_has_a_panel_per_stream(k: int) -> None:
    truth, x, samples = make_posterior(k)
    figure = plots.plot_reconstruction(TINY, samples, x, truth)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == len(TINY.grids)
    assert labels(figure) == ["data", "posterior median", "90 % band", "truth"]
    for axes, grid in zip(figure.axes, TINY.grids, strict=True):
        data, median, true = axes.lines
        num = min(grid.num_samples, 200)
        for line in (data, median, true):
            assert np.shape(line.get_ydata()) == (num,)
        assert len(axes.collections) == 1  # the band
    assert len(plots.plot_reconstruction(TINY, samples, x[0]).axes[0].lines) == 2


def test_reconstruction_draws_the_simulators_signal() -> None:
    truth, x, _ = make_posterior(3)
    figure = plots.plot_reconstruction(TINY, truth, x, truth)
    signal = TINY.simulator.signal(truth)[0]
    for axes, part in zip(figure.axes, (signal[:200], signal[200:]), strict=True):
        for line in axes.lines[1:]:
            torch.testing.assert_close(torch.as_tensor(line.get_ydata()).float(), part)


def test_reconstruction_says_where_it_cuts_a_stream() -> None:
    truth, x, samples = make_posterior(1)
    figure = plots.plot_reconstruction(TINY, samples, x, truth, max_points=50)
    assert "first 50 of 200 samples" in figure.axes[0].get_title(loc="left")
    assert np.shape(figure.axes[0].lines[0].get_xdata()) == (50,)


def test_reconstruction_of_a_problem_without_grids() -> None:
    problem = linear_gaussian()
    truth = problem.prior.sample((1,), generator_for(0))
    x = problem.simulator(truth, generator_for(1))
    samples = problem.exact_posterior().sample((100,), x, generator=generator_for(2))
    figure = plots.plot_reconstruction(problem, samples, x, truth)
    assert [axes.get_xlabel() for axes in figure.axes] == ["sample"]


def draws_of(axes: Axes) -> list[Line2D]:
    """The draws, a line for each source."""
    return [line for line in axes.lines if line.get_marker() == "."]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_spectrum_marks_draws_and_truth(k: int) -> None:
    truth, x, samples = make_posterior(k)
    figure = plots.plot_spectrum(TINY, samples, x, truth)
    upper, lower = figure.axes
    # The spectrum itself has most of the room.
    assert lower.get_position().height > 1.5 * upper.get_position().height
    assert len(upper.lines) == k
    assert len(draws_of(lower)) == k
    assert len([line for line in lower.lines if line.get_linestyle() == "--"]) == k
    assert len([line for line in lower.lines if line.get_marker() == "+"]) == (k > 0)
    expected = ["spectrum of the data", "posterior draws", "truth"]
    assert labels(figure) == expected[: 3 if k else 1]


def test_spectrum_integrates_to_the_expected_cardinality() -> None:
    _, x, samples = make_posterior(3)
    mixed = torch.cat([samples, make_posterior(1)[2]])
    (stairs,) = plots.plot_spectrum(TINY, mixed, x).axes[0].patches
    values, edges, _ = stairs.get_data()  # pyright: ignore[reportAttributeAccessIssue]
    assert (values * (edges[1:] - edges[:-1])).sum() == pytest.approx(2.0)


def test_spectrum_shows_every_component_where_draws_are_thinned() -> None:
    _, x, samples = make_posterior(3, num=4_000)
    for num in (1_700, 2_000, 4_000):
        lower = plots.plot_spectrum(TINY, samples[:num], x).axes[1]
        shown = [np.asarray(line.get_xdata()) for line in draws_of(lower)]
        frequencies = torch.as_tensor(np.concatenate(shown))
        parts = LAYOUT.unpack(samples)
        for slot in range(3):
            centre = parts.components[:, slot, 2].median()
            share = ((frequencies - centre).abs() < 0.04).double().mean().item()
            assert share == pytest.approx(1 / 3, abs=0.02)


def test_spectrum_writes_probabilities_that_do_not_hide_each_other() -> None:
    # three in a row, of which each has room beside the next but one only
    num, generator = 600, generator_for(4)
    noise = torch.randn(num, 3, 3, generator=generator)
    centre = torch.tensor([[0.6, 1.0, 1.0], [0.9, 3.0, 1.06], [1.3, 5.0, 1.12]])
    there = torch.rand(num, 3, generator=generator) < torch.tensor([0.8, 0.7, 0.6])
    components = centre + noise * torch.tensor([0.02, 0.1, 0.004])
    order = (~there).long().argsort(dim=-1, stable=True)
    components = components.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
    rows = LAYOUT.pack(there.sum(-1), components, torch.full((num, 1), 0.3))
    lower = plots.plot_spectrum(TINY, rows, torch.zeros(TINY.num_data)).axes[1]
    notes = [text for text in lower.texts if isinstance(text, Annotation)]
    above = {text.xy[0]: text for text in notes if text.get_text() != "probability:"}
    places = sorted(above)
    np.testing.assert_allclose(places, centre[:, 2], atol=0.01)
    shown = [float(above[place].get_text()) for place in places]
    np.testing.assert_allclose(shown, there.double().mean(0), atol=0.011)
    heights = [above[place].xyann[1] for place in places]
    assert heights[0] != heights[1] != heights[2]


def test_spectrum_of_a_sinusoid_peaks_at_its_amplitude() -> None:
    row = torch.tensor([[1.0, 0.5, 1.2, 0.3, 1.25, *[0.0] * 6]])
    x = TINY.simulator.signal(row)
    line = plots.plot_spectrum(TINY, row, x).axes[1].lines[0]
    frequency, amplitude = (torch.as_tensor(v) for v in line.get_data())
    assert amplitude.max().item() == pytest.approx(1.2, rel=0.02)
    assert frequency[amplitude.argmax()].item() == pytest.approx(1.25, abs=0.01)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_corner_has_a_panel_per_pair(k: int) -> None:
    truth, _, samples = make_posterior(k)
    figure = plots.plot_corner(samples, LAYOUT, k, truth, periods=PERIODS)
    num = 3 * k + 1
    assert len(figure.axes) == num * (num + 1) // 2
    pairs = [axes for axes in figure.axes if axes.collections]
    assert len(pairs) == num * (num - 1) // 2
    assert ("50 %" in labels(figure)) == (num > 1)
    assert "truth" in labels(figure)


def test_corner_labels_name_parameter_component_and_unit() -> None:
    _, _, samples = make_posterior(1)
    figure = plots.plot_corner(samples, LAYOUT, units={"frequency": "Hz"})
    below = ["amplitude 1", "phase 1", "frequency 1\n(Hz)", "sigma"]
    assert sorted(set(annotations(figure))) == sorted(below)
    only = plots.plot_corner(samples, LAYOUT, names=["frequency"])
    assert annotations(only) == ["frequency 1"]


def test_corner_has_ticks_at_its_outer_panels_only() -> None:
    figure = plots.plot_corner(make_posterior(1)[2], LAYOUT)
    edges = [axes.get_position() for axes in figure.axes]
    lowest, leftmost = min(e.y0 for e in edges), min(e.x0 for e in edges)
    top = max(e.y0 for e in edges)
    for axes, edge in zip(figure.axes, edges, strict=True):
        assert bool(len(axes.get_xticks())) == (edge.y0 == lowest)
        beside = edge.x0 == leftmost and edge.y0 != top
        assert bool(len(axes.get_yticks())) == beside


def test_corner_takes_the_most_frequent_cardinality() -> None:
    samples = torch.cat([make_posterior(1)[2][:20], make_posterior(0)[2]])
    assert len(plots.plot_corner(samples, LAYOUT).axes) == 1
    assert len(plots.plot_corner(samples, LAYOUT, k=1).axes) == 10


def test_corner_marks_only_shared_truth_where_cardinalities_differ() -> None:
    figure = plots.plot_corner(
        make_posterior(1)[2], LAYOUT, 1, make_posterior(3)[0], names=["amplitude"]
    )
    assert not figure.axes[0].lines
    figure = plots.plot_corner(make_posterior(1)[2], LAYOUT, 1, make_posterior(3)[0])
    assert len(figure.axes[-1].lines) == 1


def test_corner_keeps_a_peak_at_the_seam_whole() -> None:
    truth, _, samples = make_posterior(1)
    column = LAYOUT.names.index("phase_1")
    spread = torch.linspace(-0.2, 0.2, len(samples))
    samples[:, column] = spread.remainder(2 * math.pi)
    truth[:, column] = 2 * math.pi - 0.05
    figure = plots.plot_corner(
        samples, LAYOUT, 1, truth, names=["phase"], periods=PERIODS
    )
    low, high = figure.axes[0].get_xlim()
    assert high - low < 0.7
    true = float(figure.axes[0].lines[0].get_xdata()[0])  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert low < true < high


def test_corner_survives_a_single_draw_and_constant_columns() -> None:
    _, _, samples = make_posterior(3)
    for rows in (samples[:1], samples[:1].expand(50, -1)):
        figure = plots.plot_corner(rows, LAYOUT, names=["phase", "sigma"])
        figure.draw_without_rendering()


@pytest.mark.parametrize("true", [None, 0, 3])
def test_cardinality_has_a_bar_per_value(true: int | None) -> None:
    probs = torch.tensor([0.0, 0.1, 0.6, 0.3])
    figure = plots.plot_cardinality(probs, true)
    (axes,) = figure.axes
    heights = [bar.get_height() for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert heights == pytest.approx(probs.tolist())
    assert labels(figure) == ([] if true is None else ["truth"])
    same = plots.plot_cardinality(torch.distributions.Categorical(probs=probs))
    assert len(same.axes[0].patches) == 4


def test_figures_leave_pyplot_and_settings_alone() -> None:
    from matplotlib import pyplot as plt

    before, settings = plt.get_fignums(), mpl.rcParams.copy()
    truth, x, samples = make_posterior(1)
    made = [
        plots.plot_reconstruction(TINY, samples, x, truth),
        plots.plot_spectrum(TINY, samples, x, truth),
        plots.plot_corner(samples, LAYOUT, 1, truth),
        plots.plot_cardinality([0.2, 0.8], 1),
    ]
    assert len(made) == 4
    assert plt.get_fignums() == before
    assert mpl.rcParams.copy() == settings


def test_unwrap_shifts_by_whole_periods_to_near_the_mean() -> None:
    values = torch.tensor([6.1, 0.1, 0.2, 6.2, 12.0])
    shifted = unwrap(values, 2 * math.pi)
    turns = (shifted - values) / (2 * math.pi)
    torch.testing.assert_close(turns, turns.round(), atol=1e-5, rtol=0)
    assert shifted.max() - shifted.min() < math.pi
    assert 0 <= unwrap(torch.tensor([-0.5]), 3.0).item() < 3.0
    with pytest.raises(ValueError, match="period must be positive"):
        unwrap(values, 0.0)


def test_errors_say_what_is_wrong() -> None:
    truth, x, samples = make_posterior(1)
    with pytest.raises(ValueError, match="must have 300 entries, got 299"):
        plots.plot_spectrum(TINY, samples, x[:, 1:])
    with pytest.raises(ValueError, match="must have 300 entries, got 299"):
        plots.plot_reconstruction(TINY, samples, x[:, 1:])
    with pytest.raises(ValueError, match="one observation"):
        plots.plot_reconstruction(TINY, samples, x.expand(2, -1))
    with pytest.raises(ValueError, match="S >= 1"):
        plots.plot_corner(samples[:0], LAYOUT)
    with pytest.raises(ValueError, match="true_theta must be one row"):
        plots.plot_corner(samples, LAYOUT, true_theta=truth.expand(2, -1))
    with pytest.raises(ValueError, match="no sample has cardinality 3"):
        plots.plot_corner(samples, LAYOUT, k=3)
    with pytest.raises(ValueError, match="unknown parameter"):
        plots.plot_corner(samples, LAYOUT, names=["pitch"])
    with pytest.raises(ValueError, match="nothing to plot"):
        plots.plot_corner(torch.zeros(5, 3), ThetaLayout(2, ("a",)), k=0)
    linear = linear_gaussian()
    with pytest.raises(ValueError, match="problem with a spectrum"):
        plots.plot_spectrum(linear, torch.zeros(1, linear.layout.size), torch.zeros(6))
    with pytest.raises(ValueError, match="add up to 1"):
        plots.plot_cardinality([0.2, 0.2])
    with pytest.raises(ValueError, match="one observation"):
        plots.plot_cardinality(torch.full((2, 2), 0.5))
    with pytest.raises(ValueError, match=r"lie in 0\.\.1"):
        plots.plot_cardinality([0.5, 0.5], 2)


def test_cardinality_stands_beside_a_reference() -> None:
    first, second = [0.1, 0.9], [0.3, 0.7]
    figure = plots.plot_cardinality(first, 1, reference=second, labels=("a", "b"))
    heights = [bar.get_height() for bar in figure.axes[0].patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert heights == pytest.approx(first + second)
    assert labels(figure) == ["a", "b", "truth"]
    with pytest.raises(ValueError, match="reference must hold 2 probabilities, got 3"):
        plots.plot_cardinality(first, reference=[0.2, 0.3, 0.5])


def crossing(num: int) -> Tensor:
    """Rows of two components whose frequencies overlap; their amplitudes do not."""
    noise = torch.randn(num, 2, 3, generator=generator_for(0))
    centre = torch.tensor([[0.6, 1.0, 1.00], [1.4, 4.0, 1.01]])
    components = torch.zeros(num, 3, 3)
    components[:, :2] = centre + noise * torch.tensor([0.02, 0.1, 0.01])
    rows = LAYOUT.pack(torch.full((num,), 2), components, 0.3 + 0.01 * noise[:, 0, :1])
    return LAYOUT.canonical(rows)


def test_corner_matches_components_whose_order_changes() -> None:
    rows = crossing(600)
    truth = rows[:1]

    def spans(match: bool) -> list[float]:
        figure = plots.plot_corner(
            rows, LAYOUT, true_theta=truth, names=["amplitude"], match=match
        )
        return [float(np.ptp(axes.get_xlim())) for axes in figure.axes[::2]]

    assert max(spans(True)) < 0.3
    assert min(spans(False)) > 0.8


def test_corner_draws_a_reference_over_the_samples() -> None:
    truth, _, samples = make_posterior(2)
    other = make_posterior(2, num=500)[2]
    figure = plots.plot_corner(samples, LAYOUT, 2, truth, reference=other)
    assert "reference" in labels(figure)
    alone = plots.plot_corner(samples, LAYOUT, 2, truth)
    pairs = [axes for axes in figure.axes if axes.collections]
    before = [axes for axes in alone.axes if axes.collections]
    assert len(pairs) == len(before)
    for axes, bare in zip(pairs, before, strict=True):
        assert len(axes.collections) == len(bare.collections) + 1
    with pytest.raises(ValueError, match="no row of the reference has cardinality 2"):
        plots.plot_corner(samples, LAYOUT, 2, reference=make_posterior(1)[2])


def test_histograms_of_samples_and_reference_have_one_area() -> None:
    samples = make_posterior(2)[2]
    other = make_posterior(2, num=5_000)[2]
    figure = plots.plot_corner(samples, LAYOUT, 2, reference=other, names=["sigma"])
    (axes,) = figure.axes
    areas = []
    for patch in axes.patches:
        assert isinstance(patch, StepPatch)
        heights, edges, _ = patch.get_data()
        areas.append(float(heights @ np.diff(edges)))
    assert len(areas) == 2
    # The outermost draws may be cut.
    assert areas[1] == pytest.approx(areas[0], rel=0.02)


def test_sources_have_a_corner_each() -> None:
    truth, _, samples = make_posterior(3)
    mixed = torch.cat([samples, make_posterior(0)[2]])
    figure = plots.plot_source_corners(mixed, LAYOUT, truth, columns=2)
    assert len(figure.axes) == 3 * 6
    corners = torch.tensor([axes.get_position().extents for axes in figure.axes])
    assert ((corners >= 0) & (corners <= 1)).all()
    assert len({tuple(corner.tolist()) for corner in corners}) == len(figure.axes)
    titles = [text.get_text() for text in figure.texts]
    assert titles == [f"Source {i}: there with probability 0.50" for i in (1, 2, 3)]
    marked = [len(axes.lines) for axes in figure.axes]
    assert sorted(set(marked)) == [1, 2]
    with pytest.raises(ValueError, match="nothing to plot: the samples have no source"):
        plots.plot_source_corners(make_posterior(0)[2], LAYOUT)
    with pytest.raises(ValueError, match="columns must be at least 1"):
        plots.plot_source_corners(samples, LAYOUT, columns=0)


def history(rates: list[float]) -> list[dict[str, float]]:
    terms = ("cardinality", "flow", "shared", "correct")
    return [
        {"step": 100.0 * i, "learning_rate": rate}
        | {f"{kind}_{t}": 1.0 / (i + 1) for kind in ("train", "val") for t in terms}
        for i, rate in enumerate(rates)
    ]


def test_training_marks_drops_of_the_learning_rate() -> None:
    figure = plots.plot_training(history([1.0, 1.0, 0.5, 0.45, 0.2, 0.2]))
    assert len(figure.axes) == 5
    for axes in figure.axes:
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        places = [float(np.asarray(line.get_xdata())[0]) for line in dotted]
        assert places == [200.0, 400.0]
    assert "learning rate drops" in labels(figure)
    # a cosine, which ends at zero
    cosine = [0.5 + 0.5 * math.cos(math.pi * i / 10) for i in range(11)]
    for rates in (cosine, cosine[::2], [0.0015, 0.0005, 0.0]):
        smooth = plots.plot_training(history(rates))
        assert "learning rate drops" not in labels(smooth)
    with pytest.raises(ValueError, match="history must hold at least one entry"):
        plots.plot_training([])
    with pytest.raises(ValueError, match="history must have the keys"):
        plots.plot_training([{"step": 1.0}])


def test_training_leaves_out_terms_that_do_not_exist() -> None:
    entries = [dict(entry, val_shared=0.0) for entry in history([1.0, 1.0])]
    titles = [a.get_title(loc="left") for a in plots.plot_training(entries).axes]
    assert len(titles) == 4
    assert not any("Shared" in title for title in titles)


def test_widths_are_those_of_the_exact_posterior() -> None:
    """A Gaussian's, whose deviation given K is known in closed form."""
    problem = linear_gaussian()
    exact = problem.exact_posterior()
    theta = problem.prior.with_cardinality([0.0, 1.0, 0.0, 0.0]).sample(
        (6,), generator_for(0)
    )
    x = problem.simulator(theta, generator_for(1))
    found = plots.posterior_widths(
        exact,  # pyright: ignore[reportArgumentType]
        theta,
        x,
        num_samples=2_000,
        relative=(),
        generator=generator_for(2),
    )
    expected = math.sqrt(0.25 * (1 - 0.25 / 1.25))
    for widths in found.values():
        # 6 standard errors of a deviation of 2,000 draws; 12 of them.
        assert (widths - expected).abs().max() < 6 * expected / math.sqrt(4_000)
    empty = torch.zeros(1, problem.layout.size)
    with pytest.raises(ValueError, match="rows with K >= 1"):
        plots.posterior_widths(exact, empty, x[:1])  # pyright: ignore[reportArgumentType]


def test_scaling_fits_a_power_law() -> None:
    k = torch.tensor([1, 2, 4, 8]).repeat(3)
    figure = plots.plot_width_scaling(k, {"a": 0.1 * k.double() ** 0.5})
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Proportional to K^0.5"
    for wrong in (torch.zeros(12), torch.ones(11)):
        with pytest.raises(ValueError, match="widths of 'a' must be positive"):
            plots.plot_width_scaling(k, {"a": wrong})
    with pytest.raises(ValueError, match="cardinality must hold K >= 1"):
        plots.plot_width_scaling(torch.zeros(3), {"a": torch.ones(3)})
    with pytest.raises(ValueError, match="widths must hold at least one"):
        plots.plot_width_scaling(k, {})


def test_figures_show_themselves_in_a_notebook() -> None:
    picture = plots.plot_cardinality(torch.tensor([0.2, 0.8]))._repr_png_()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[i : i + 4]) for i in (16, 20))
    assert 100 < height < width < 1_000


@pytest.mark.parametrize("value", [1e-21, 3e21, -2.0])
def test_a_corner_shows_a_constant_in_its_own_unit(value: float) -> None:
    low, high = Column("a", np.full(100, value), None).range
    assert low == pytest.approx(value - 0.5 * abs(value))
    assert high == pytest.approx(value + 0.5 * abs(value))
    narrow = Column("a", value * np.linspace(1, 1.01, 100), None)
    assert np.ptp(narrow.range) < 0.02 * abs(value)

"""Trees hold what they say, survive a file, and ArviZ's functions take them as is."""

import json
import math
import warnings
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor

from sbi_slotflow import PosteriorDraws, load_pretrained, problems, to_datatree
from sbi_slotflow.posterior.refine import RefinedPosterior
from sbi_slotflow.seeding import generator_for

mpl.use("Agg")
arviz_plots = pytest.importorskip("arviz_plots")
xarray = pytest.importorskip("xarray")

TINY = problems.sinusoids("tiny")
LAYOUT = TINY.layout
GROUPS = {
    "posterior",
    "posterior_given_k",
    "sample_stats",
    "observed_data",
    "posterior_predictive",
    "pit",
    "prior",
    "constant_data",
}


@pytest.fixture(scope="module")
def truth() -> Tensor:
    prior = TINY.prior.with_cardinality([0.0, 0.0, 1.0, 0.0])
    return prior.sample((1,), generator_for(5))


@pytest.fixture(scope="module")
def x(truth: Tensor) -> Tensor:
    return TINY.simulator(truth, generator_for(6))[0]


@pytest.fixture(scope="module")
def posterior():
    return load_pretrained("sinusoids-tiny")


@pytest.fixture(scope="module")
def tree(posterior, x, truth):
    return posterior.to_datatree(
        400, x, generator_for(7), true_theta=truth, attrs={"run": "test"}
    )


@pytest.fixture(scope="module")
def weighted(x) -> PosteriorDraws:
    """Two chains of draws of all K, and weights that favour K = 1."""
    theta = TINY.prior.sample((2, 300), generator_for(8))
    k = LAYOUT.cardinality(theta)
    noise = torch.rand(k.shape, generator=generator_for(9))
    return PosteriorDraws(LAYOUT, theta, x, noise + 3.0 * (k == 1))


def of(tree: Any, group: str, name: str) -> Tensor:
    return torch.as_tensor(tree[group][name].values)


def test_groups_and_dimensions(tree, x):
    assert set(tree.children) == GROUPS
    assert tree["posterior"]["frequency"].dims == ("chain", "draw", "component")
    assert tree["posterior"]["frequency"].shape == (1, 400, 3)
    assert tree["posterior_predictive"]["signal"].shape == (1, 100, len(x))
    assert tree["prior"]["K"].shape == (1, 1_000)
    assert torch.equal(of(tree, "observed_data", "x"), x)


def test_posterior_holds_the_draws_nan_where_the_mask_says_so(posterior, tree, x):
    rows = posterior.sample((400,), x, generator=generator_for(7))
    parts = LAYOUT.unpack(rows)
    active = of(tree, "sample_stats", "active")[0]
    assert torch.equal(active, parts.mask)
    assert torch.equal(of(tree, "posterior", "K")[0], parts.cardinality)
    assert torch.equal(of(tree, "posterior", "sigma")[0], parts.shared[:, 0])
    for i, name in enumerate(LAYOUT.component_names):
        values = of(tree, "posterior", name)[0]
        assert torch.equal(values.isnan(), ~active)
        assert torch.equal(values[active], parts.components[..., i][active])


def test_lp_is_the_log_density_of_the_draws(posterior, tree, x):
    rows = posterior.sample((400,), x, generator=generator_for(7))
    values = posterior.log_prob(rows, x)
    torch.testing.assert_close(of(tree, "sample_stats", "lp")[0], values)


def test_signals_are_those_of_the_draws(posterior, tree, x):
    rows = posterior.sample((400,), x, generator=generator_for(7))
    chosen = torch.linspace(0, 399, 100).round().long()
    signals = TINY.simulator.signal(rows[chosen])
    torch.testing.assert_close(of(tree, "posterior_predictive", "signal")[0], signals)
    # Replicates scatter about them by sigma; 30,000 residuals give it to 0.4 %.
    noise = of(tree, "posterior_predictive", "x")[0] - signals
    sigma = LAYOUT.unpack(rows[chosen]).shared
    assert (noise / sigma).std().item() == pytest.approx(1.0, abs=0.025)


def test_pit_ranks_the_data_among_its_replicates(tree, x):
    replicates = of(tree, "posterior_predictive", "x")[0]
    pit = of(tree, "pit", "x")
    below = (replicates < x).sum(0)
    assert ((pit * 101 - below >= 0) & (pit * 101 - below <= 1)).all()


def test_attributes_tell_where_the_tree_comes_from(tree, posterior):
    assert tree.attrs["run"] == "test"
    assert int(tree.attrs["seed"]) == generator_for(7).initial_seed()
    assert tree.attrs["sbi_slotflow_version"]
    assert json.loads(tree.attrs["periods"]) == {"phase": math.tau}
    assert json.loads(tree.attrs["model_card"]) == posterior.model_card


def test_the_kept_seed_repeats_the_draws(posterior, x):
    first = posterior.to_datatree(50, x, num_prior=0, num_predictive=0)
    generator = torch.Generator().manual_seed(int(first.attrs["seed"]))
    again = posterior.to_datatree(50, x, generator, num_prior=0, num_predictive=0)
    assert first["posterior"].equals(again["posterior"])


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_trees_survive_a_file(tree, tmp_path, kind):
    path = tmp_path / f"tree.{kind}"
    if kind == "netcdf":
        tree.to_netcdf(path, engine="h5netcdf")
        engine = "h5netcdf"
    else:
        pytest.importorskip("zarr")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr's of its unfinished format
            tree.to_zarr(path)
        engine = "zarr"
    with xarray.open_datatree(path, engine=engine) as back:
        assert set(back.children) == GROUPS
        assert dict(back.attrs) == dict(tree.attrs)
        for name in GROUPS:
            xarray.testing.assert_identical(
                back[name].to_dataset().load(), tree[name].to_dataset()
            )


def test_draws_given_k_are_complete_and_phases_whole(tree, posterior, x):
    given = tree["posterior_given_k"]
    k = given.attrs["k"]
    counts = np.bincount(tree["posterior"]["K"].values.ravel())
    assert k == counts.argmax()
    assert given["phase"].shape == (1, counts.max(), k)
    assert not any(np.isnan(given[name]).any() for name in given.data_vars)
    raw = tree["posterior"].isel(component=slice(0, k)).to_dataset()
    raw = raw.where(raw["K"] == k, drop=True)
    turns = (given["phase"].values - raw["phase"].values) / math.tau
    assert np.allclose(turns, turns.round(), atol=1e-5)
    assert (np.ptp(given["phase"].values, axis=1) <= math.tau).all()


def test_draws_given_k_keep_chains_of_similar_length(x):
    theta = torch.stack(
        [
            TINY.prior.with_cardinality([0.0, 1.0, share, 0.0]).sample(
                (200,), generator_for(int(10 * share))
            )
            for share in (0.2, 0.5)
        ]
    )
    tree = to_datatree(theta, LAYOUT)
    ones = (LAYOUT.cardinality(theta) == 1).sum(-1)
    assert tree["posterior_given_k"]["sigma"].shape == (2, ones.min())
    lone = theta.clone()
    lone[1] = lone[1, LAYOUT.cardinality(theta[1]) == 2][:1]
    tree = to_datatree(lone, LAYOUT)
    assert tree["posterior_given_k"]["sigma"].shape[0] == 1


def test_no_component_at_all(posterior, x):
    rows = LAYOUT.pack(torch.zeros(20).long(), torch.zeros(20, 3, 3), torch.rand(20, 1))
    tree = to_datatree(rows, LAYOUT, x=x, simulator=TINY.simulator)
    assert tree["posterior_given_k"].attrs["k"] == 0
    assert set(tree["posterior_given_k"].data_vars) == {"sigma"}
    assert np.isnan(tree["posterior"]["phase"]).all()


def test_weights_choose_the_draws_given_k_and_the_predictive_ones(weighted):
    tree = weighted.to_datatree(problem=TINY, generator=generator_for(0))
    weights = weighted.weights.reshape(2, 300)
    assert torch.equal(of(tree, "sample_stats", "weight"), weights)
    assert float(tree["sample_stats"]["ess"]) == pytest.approx(weighted.ess)
    assert tree["posterior_given_k"].attrs["k"] == 1
    one = LAYOUT.cardinality(weighted.theta) == 1
    sigma = of(tree, "posterior_given_k", "sigma")[0]
    kept = LAYOUT.unpack(weighted.theta[one]).shared[:, 0]
    expected = weights[one] / weights[one].sum() * len(kept)
    counts = (sigma.unsqueeze(-1) == kept).sum(0)
    assert ((counts - expected).abs() <= 1 + 1e-6).all()


def test_lp_of_draws_is_prior_times_likelihood(weighted):
    tree = weighted.to_datatree(problem=TINY, generator=generator_for(0))
    rows = weighted.rows
    expected = TINY.prior.log_prob(rows) + TINY.log_likelihood(rows, weighted.x)
    found = of(tree, "sample_stats", "lp").flatten()
    torch.testing.assert_close(found, expected.double())


def test_refined_draws_bring_their_diagnostics(posterior, x):
    refined = posterior.refine(TINY.log_likelihood, x, 500, generator=generator_for(1))
    assert isinstance(refined, RefinedPosterior)
    stats: Any = refined.to_datatree()["sample_stats"]
    assert float(stats["ess"]) == pytest.approx(refined.ess)
    assert float(stats["pareto_k"]) == pytest.approx(refined.pareto_k, nan_ok=True)
    assert float(stats["log_evidence"]) == pytest.approx(refined.log_evidence)


def skipping(*names: str) -> dict[str, dict[str, bool]]:
    """Options that let ArviZ skip NaN; it changes the dictionaries that it is given."""
    return {name: {"skipna": True} for name in names}


def test_summary_speaks_of_the_draws_that_have_a_component(tree):
    from arviz_stats.summary import summary

    table = summary(tree, kind="stats", skipna=True, round_to=8)
    frequency = of(tree, "posterior", "frequency")[0]
    for i in range(2):
        expected = frequency[:, i].nanmean().item()
        found = table.loc[f"frequency[{i + 1}]", "mean"]
        assert float(found) == pytest.approx(expected, rel=1e-4)
    given = summary(tree, group="posterior_given_k", round_to=8)
    assert (np.asarray(given["ess_bulk"], float) > 50).all()


@pytest.mark.parametrize("group", ["posterior", "posterior_given_k", "prior"])
@pytest.mark.parametrize("name", ["plot_dist", "plot_forest", "plot_trace_dist"])
def test_arviz_plots_the_tree(tree, group, name):
    """Every line that ArviZ draws of the first component is finite."""
    options: dict[str, Any] = {}
    if name == "plot_dist":
        options["stats"] = skipping("credible_interval", "point_estimate")
    elif name == "plot_forest":
        options["stats"] = skipping("trunk", "twig", "point_estimate")
    plot = getattr(arviz_plots, name)
    collection = plot(
        tree,
        group=group,
        var_names=["amplitude", "frequency"],
        coords={"component": [1]},
        backend="matplotlib",
        **options,
    )
    figure = collection.viz["figure"].item()
    lines = [line for axes in figure.axes for line in axes.lines]
    drawn = [np.asarray(line.get_ydata(), float) for line in lines]
    assert len(drawn) >= 2
    if name == "plot_trace_dist":  # a trace shows by gaps where there is none
        assert all(np.isfinite(values).any() for values in drawn)
    else:
        assert all(np.isfinite(values).all() for values in drawn)
    mpl.pyplot.close("all")  # pyright: ignore[reportAttributeAccessIssue]


def outside(collection: Any) -> bool:
    """Whether the curve of ``plot_ecdf_pit`` leaves its band."""
    (axes,) = (a for a in collection.viz["figure"].item().axes if a.lines)
    (curve,) = axes.lines
    (band,) = axes.collections
    points = np.asarray(band.get_paths()[0].vertices)
    middle = len(points) // 2
    edges = points[1:middle], points[middle + 1 : -1]
    steps = np.column_stack([curve.get_xdata(), curve.get_ydata()]).astype(float)
    # At its ends the band has no width.
    steps = steps[(steps[:, 0] > 0.02) & (steps[:, 0] < 0.98)]
    bounds = [np.interp(steps[:, 0], *edge[edge[:, 0].argsort()].T) for edge in edges]
    low, high = np.minimum(*bounds), np.maximum(*bounds)
    mpl.pyplot.close("all")  # pyright: ignore[reportAttributeAccessIssue]
    return bool(((steps[:, 1] < low) | (steps[:, 1] > high)).any())


def test_ecdf_pit_tells_a_right_model_from_a_wrong_one(posterior, x):
    """The band holds all of a right curve in 99 % of cases; the seeds are fixed."""

    def plotted(data: Tensor) -> Any:
        tree = to_datatree(
            posterior.sample((500,), x, generator=generator_for(1)),
            LAYOUT,
            x=data,
            simulator=TINY.simulator,
            num_predictive=400,
            generator=generator_for(2),
        )
        return arviz_plots.plot_ecdf_pit(
            tree, group="pit", sample_dims=["sample_index"], backend="matplotlib"
        )

    assert not outside(plotted(x))
    assert outside(plotted(x + 0.3))
    assert outside(plotted(1.5 * x))


def test_arviz_plots_the_predictive_draws(tree):
    collection = arviz_plots.plot_ppc_dist(tree, backend="matplotlib", num_samples=20)
    figure = collection.viz["figure"].item()
    assert sum(len(axes.lines) for axes in figure.axes) >= 21
    mpl.pyplot.close("all")  # pyright: ignore[reportAttributeAccessIssue]


def test_bad_input_is_named(posterior, x, weighted):
    rows = TINY.prior.sample((4,), generator_for(0))
    with pytest.raises(ValueError, match=r"samples must have shape \(draws, E\) or"):
        to_datatree(rows[0], LAYOUT)
    with pytest.raises(ValueError, match=r"weights must have shape \(1, 4\), got"):
        to_datatree(rows, LAYOUT, weights=torch.ones(4))
    with pytest.raises(ValueError, match=r"log_prob must have shape \(1, 4\), got"):
        to_datatree(rows, LAYOUT, log_prob=torch.ones(3))
    with pytest.raises(ValueError, match="num_predictive must not be negative"):
        to_datatree(rows, LAYOUT, num_predictive=-1)
    with pytest.raises(ValueError, match="prior_samples must have"):
        to_datatree(rows, LAYOUT, prior_samples=rows[:, 1:])
    with pytest.raises(ValueError, match="true_theta must be one row"):
        to_datatree(rows, LAYOUT, true_theta=rows)
    with pytest.raises(ValueError, match=r"to_datatree\(\) takes one observation"):
        posterior.to_datatree(5, torch.stack([x, x]))
    with pytest.raises(ValueError, match="problem must have the layout"):
        weighted.to_datatree(problem=problems.linear_gaussian())

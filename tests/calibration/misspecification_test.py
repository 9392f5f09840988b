"""An observation unlike the training data has a small p-value and raises a warning."""

import math
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import binom, kstest

from sbi_slotflow import SlotPosterior, load_pretrained, problems, slot_nn
from sbi_slotflow.calibration import TrainingReference, UnlikeTrainingWarning
from sbi_slotflow.seeding import generator_for
from sbi_slotflow.storage import read_tensors, write_tensors

tiny = problems.sinusoids("tiny")


def simulate(num, seed, problem: problems.Trace | problems.Sinusoids = tiny):
    theta = problem.prior.sample((num,), generator_for(seed, 0))
    return problem.simulator(theta, generator_for(seed, 1))


@pytest.fixture(scope="module")
def reference():
    return TrainingReference.fit(simulate(3_000, 0))


@pytest.mark.parametrize("problem", [tiny, problems.linear_gaussian()])
def test_p_values_of_fresh_data_are_uniform(problem):
    reference = TrainingReference.fit(simulate(3_000, 0, problem))
    fresh = simulate(1_000, 1, problem)
    # Distances of 1,000 and 1,500 are compared: a false alarm in 10,000 runs.
    check = reference.check(fresh, false_alarm_rate=1e-4)
    assert check.passed
    assert list(check.p_values) == ["all observations"]
    # The same of p-values whose reference is itself a sample of 1,500: twice as wide.
    assert kstest(reference.p_values(fresh).numpy(), "uniform").statistic < 0.1


def loud(x):
    """Forty times as loud as noise of unit variance."""
    return 40 * x / x.square().mean(-1, keepdim=True).sqrt()


def glitch(x):
    x = x.clone()
    x[:, 100] += 15 * x.std(-1)
    return x


CHANGES = {
    "louder": loud,
    "glitch": glitch,
    "coloured": lambda x: torch.nn.functional.avg_pool1d(x, 5, 1, 2),
    "silent half": lambda x: torch.where(torch.arange(x.shape[-1]) < 150, 0.01 * x, x),
    "drift": lambda x: x + torch.linspace(-3, 3, x.shape[-1]),
}


@pytest.mark.parametrize("unit", [2.0**-70, 2.0**70])  # 1e-21, 1e+21
def test_p_values_do_not_depend_on_the_unit(reference, unit):
    scaled = TrainingReference.fit(unit * simulate(3_000, 0))
    for x in (simulate(50, 1), loud(simulate(50, 1))):
        # Logarithms of scaled numbers round in another place.
        found, expected = scaled.p_values(unit * x), reference.p_values(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("change", CHANGES)
def test_foreign_data_are_noticed_one_by_one(reference, change):
    # Signals that swamp the change may hide it: nine in ten must have p below 0.01.
    p = reference.p_values(CHANGES[change](simulate(100, 2)))
    assert (p < 0.01).float().mean() >= 0.9


def test_check_names_the_foreign_observation(reference):
    x = simulate(3, 3)
    x[1] = loud(x[1])
    check = reference.check(x, false_alarm_rate=0.01)
    assert check.failures == ("observation 2",)
    assert check.numbers["num"] == 3


def test_reference_survives_a_file(reference, tmp_path):
    path = tmp_path / "reference.safetensors"
    reference.save(path)
    x = simulate(20, 4)
    loaded = TrainingReference.load(path)
    torch.testing.assert_close(loaded.p_values(x), reference.p_values(x))
    assert loaded.level == reference.level
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="corrupt or no safetensors"):
        TrainingReference.load(path)


@pytest.fixture(scope="module")
def posterior():
    estimator = slot_nn(tiny)(tiny.prior.sample((200,)), simulate(200, 5))
    return SlotPosterior(estimator, tiny.prior)  # type: ignore[arg-type]


def test_sample_warns_in_one_line_and_can_be_silenced(posterior, reference):
    usual, foreign = simulate(1, 6), loud(simulate(1, 6))
    posterior.set_training_reference(reference)
    with pytest.warns(UnlikeTrainingWarning, match="unlike the training data") as seen:
        posterior.sample((5,), foreign)
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.sample((5,), usual)
        posterior.set_training_reference(None).sample((5,), foreign)


def test_reference_follows_the_posterior(posterior, reference):
    posterior.set_training_reference(reference)
    other = posterior.with_cardinality_prior([1, 1, 1, 2])
    assert other.training_reference is reference
    again = pickle.loads(pickle.dumps(posterior))
    with pytest.warns(UnlikeTrainingWarning):
        again.sample((5,), loud(simulate(1, 6)))


def shipped_reference(preset):
    reference = load_pretrained(f"sinusoids-{preset}").training_reference
    assert isinstance(reference, TrainingReference)
    return reference


def departed(change, num, seed):
    """Signals of ``tiny`` with something else in them, and their sigma."""
    theta = tiny.prior.sample((num,), generator_for(seed, 0))
    x = tiny.simulator(theta, generator_for(seed, 1))
    return change(x, theta[:, 1:2])


HALVES = torch.arange(300) >= 200  # which of the two records a sample is in
TIMES = torch.cat([grid.times for grid in tiny.grids]).float()
DEPARTURES = {
    "tone below the band": lambda x, sigma: x + 3 * sigma * torch.cos(1.2 * TIMES),
    "tone above the band": lambda x, sigma: x + 2 * sigma * torch.cos(18 * TIMES),
    "offset": lambda x, sigma: x + 1.5 * sigma,
    "trend": lambda x, sigma: x + sigma * (TIMES - 10) / 3,
    "step": lambda x, sigma: x + 3 * sigma * (TIMES > 12),
    "glitch": lambda x, sigma: x + 100 * sigma * (torch.arange(300) == 250),
    "glitch at the end": lambda x, sigma: x + 100 * sigma * (torch.arange(300) == 299),
}


@pytest.mark.parametrize("departure", DEPARTURES)
def test_departures_from_the_model_are_noticed_by_shipped_weights(departure):
    p = shipped_reference("tiny").p_values(departed(DEPARTURES[departure], 100, 20))
    assert (p < 1e-3).double().mean() >= 0.9


def test_a_record_of_another_noise_level_is_noticed():
    theta = tiny.prior.sample((100,), generator_for(21, 0))
    noise = theta[:, 1:2] * torch.randn(100, 300, generator=generator_for(21, 1))
    x = tiny.simulator.signal(theta) + torch.where(HALVES, 4 * noise, noise)
    assert (shipped_reference("tiny").p_values(x) < 1e-3).double().mean() >= 0.9


def test_departures_are_noticed_in_a_problem_of_another_kind():
    spikes = problems.spikes(max_cardinality=3)
    reference = TrainingReference.fit(simulate(4_000, 0, spikes))
    x = simulate(100, 1, spikes)
    for change in (
        torch.cos(1.2 * torch.arange(512)),
        20.0 * (torch.arange(512) == 300),
    ):
        assert (reference.p_values(x + change) < 1e-3).double().mean() >= 0.9
    # Noise of sigma 0.1 to 0.5, and pulses of a height of 0.5 to 2.
    louder = torch.randn(100, 512, generator=generator_for(22))
    louder = x + louder * (torch.arange(512) >= 256)
    assert (reference.p_values(louder) < 0.01).double().mean() >= 0.9


def test_false_alarms_are_as_rare_as_stated():
    reference, fresh = shipped_reference("tiny"), simulate(20_000, 30)
    p = reference.p_values(fresh)
    # The stated bound of a reference's rate; a false alarm in 10,000 runs.
    most = binom.ppf(1 - 1e-4, len(fresh), 0.0024)
    assert int((p < reference.level).sum()) <= most
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference.warn(fresh[(p >= reference.level) & (p < 5 * reference.level)])


def test_streams_are_not_mixed():
    x = simulate(4_000, 0)
    apart = TrainingReference.fit(x, streams=[200, 100])
    assert apart.scan is not None
    assert apart.scan.lengths.tolist() == [200, 100]
    # 0.2 Hz at 10 Hz is where 1 Hz is at 50 Hz, inside the band.
    strange = departed(lambda x, s: x + s * torch.cos(1.2 * TIMES), 100, 23)
    joint = TrainingReference.fit(x).p_values(strange)
    assert (apart.p_values(strange) < 0.01).sum() > 2 * (joint < 0.01).sum()
    with pytest.raises(ValueError, match=r"streams must add up to 300, got \[200, 90"):
        TrainingReference.fit(x, streams=[200, 90])
    with pytest.raises(ValueError, match="streams must be at least 1"):
        TrainingReference.fit(x, streams=[300, 0])


def test_files_of_the_first_version_are_read(reference, tmp_path):
    path, old = tmp_path / "reference.safetensors", replace(reference, scan=None)
    old.save(path)
    tensors, meta = read_tensors(path, "sbi_slotflow.TrainingReference", 2)
    write_tensors(path, tensors, {**meta, "version": 1})
    assert not any(name.startswith("scan") for name in tensors)
    x = simulate(20, 4)
    loaded = TrainingReference.load(path)
    torch.testing.assert_close(loaded.p_values(x), old.p_values(x))
    assert loaded.scan is None


def test_malformed_data_are_refused(reference):
    with pytest.raises(ValueError, match=r"x must have shape \(N, T\) with N >= 100"):
        TrainingReference.fit(torch.zeros(5, 10))
    with pytest.raises(ValueError, match="x must be finite"):
        TrainingReference.fit(torch.full((500, 10), torch.nan))
    with pytest.raises(ValueError, match="level must lie between"):
        TrainingReference.fit(simulate(200, 7), level=1e-3)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 300\)"):
        reference.p_values(torch.zeros(1, 7))


def test_an_observation_with_nan_is_refused(reference):
    x = simulate(2, 1)
    x[1, 3] = float("nan")
    with pytest.raises(ValueError, match="x must be finite"):
        reference.p_values(x)


@pytest.mark.parametrize("frequency", [0.2, 0.3, 2.3, 2.5, 3.0, 4.0])
def test_a_tone_outside_the_band_is_told_where_the_network_sees_none(
    frequency: float,
) -> None:
    problem = problems.sinusoids("tiny")
    posterior = load_pretrained("sinusoids-tiny")
    times = torch.cat([grid.times for grid in problem.grids])
    noise = 0.3 * torch.randn(len(times), generator=generator_for(0))
    x = torch.cos(2 * math.pi * frequency * times).float() + noise
    for ask in (posterior.cardinality, lambda x: posterior.sample((2,), x)):
        with pytest.warns(UnlikeTrainingWarning):
            ask(x)
    ordinary = problem.simulator(problem.prior.sample((1,), generator_for(1)))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.cardinality(ordinary)


def test_numbers_of_any_scale_and_those_that_never_move_are_looked_at() -> None:
    usual = torch.randn(1_000, 3, generator=generator_for(1))
    usual *= torch.tensor([1.0, 1e-7, 0.0])
    reference = TrainingReference.fit(usual, 0.01)
    for odd in ([0.0, 1e-2, 0.0], [0.0, 0.0, 5.0]):
        assert reference.p_values(torch.tensor([odd])) < 0.003
    assert reference.p_values(usual[:1]) > 0.01


@pytest.mark.parametrize("size", [5, 33, 45, 80])
def test_records_of_any_length_are_kept(size: int, tmp_path: Path) -> None:
    usual = torch.randn(400, size, generator=generator_for(2))
    usual[3] = 1.0  # a record that does not move
    reference = TrainingReference.fit(usual.numpy(), 0.05)
    path = tmp_path / "usual.safetensors"
    reference.save(path)
    loaded = TrainingReference.load(path)
    x = torch.randn(size, generator=generator_for(3))
    assert torch.equal(loaded.p_values(x.tolist()), reference.p_values(x))
    with pytest.raises(ValueError, match="x must have shape"):
        loaded.p_values(x.expand(0, size))


@pytest.mark.parametrize("usual", [[math.nan, 1.0], [1.0, 0.0], []])
def test_a_damaged_reference_is_refused(usual: list[float], tmp_path: Path) -> None:
    reference = TrainingReference.fit(
        torch.randn(400, 5, generator=generator_for(4)), 0.05
    )
    path = tmp_path / "usual.safetensors"
    replace(reference, usual=torch.tensor(usual, dtype=torch.float64)).save(path)
    with pytest.raises(ValueError, match="is damaged"):
        TrainingReference.load(path)

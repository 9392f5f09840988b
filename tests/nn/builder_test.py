"""Builders: what each field does, the paper's preset, and what is refused."""

import functools
import json
import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from nflows.transforms.coupling import (
    AffineCouplingTransform,
    PiecewiseRationalQuadraticCouplingTransform,
)
from sbi.utils import BoxUniform
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, LogNormal, Uniform

from sbi_slotflow import (
    AdditiveSimulator,
    SlotPosterior,
    VariableKPrior,
    WhiteNoise,
    problems,
)
from sbi_slotflow.nn import (
    AttentionSlots,
    ComponentHead,
    EstimatorSpec,
    GlobalSlots,
    MLPEncoder,
    SlotDensityEstimator,
    WhiteningChart,
    slot_nn,
)
from sbi_slotflow.nn.autoregressive_head import AutoregressiveHead
from sbi_slotflow.nn.encoders import TokenEncoder
from sbi_slotflow.nn.paper import CircleChart, DualStreamEncoder
from sbi_slotflow.problems.sinusoids.polar import PolarChart

SMALL: dict[str, Any] = {
    "hidden_features": 16,
    "trunk_features": 16,
    "flow_hidden_features": 16,
    "flow_layers": 2,
}


@pytest.fixture(scope="module")
def tiny() -> problems.Sinusoids:
    return problems.sinusoids("tiny")


def batch(problem: problems.Problem, num: int = 32) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = problem.prior.sample((num,))
        return theta, problem.simulator(theta)


def build(problem: problems.Problem, builder: slot_nn) -> SlotDensityEstimator:
    return builder(*batch(problem))


def head(estimator: SlotDensityEstimator) -> ComponentHead:
    assert isinstance(estimator.component_head, ComponentHead)
    return estimator.component_head


def couplings(estimator: SlotDensityEstimator) -> list[nn.Module]:
    kinds = (AffineCouplingTransform, PiecewiseRationalQuadraticCouplingTransform)
    return [m for m in head(estimator).flow.modules() if isinstance(m, kinds)]


@pytest.fixture(scope="module")
def paper() -> SlotDensityEstimator:
    problem = problems.sinusoids("paper")
    builder = slot_nn.paper(problem)
    return builder(*batch(problem, 2))


def test_paper_preset_has_31_million_parameters(paper: SlotDensityEstimator) -> None:
    number = sum(p.numel() for p in paper.parameters())
    assert 30e6 < number < 32e6


def test_paper_preset_is_what_its_docstring_says(paper: SlotDensityEstimator) -> None:
    spec = paper.spec
    assert isinstance(paper.chart, CircleChart)
    assert paper.chart.phase_weight == 2.0
    assert paper.chart.frequency_weight == 3.0
    assert paper.chart.centre == pytest.approx(2.75)
    assert spec.matching == "hungarian"
    assert spec.mean_flow_loss
    assert not head(paper).slots.condition_on_cardinality
    # 512 of global context and a one-hot slot index, no trunk, no K
    assert head(paper).slots.num_features == 512 + 10
    assert spec.flow["tail_bound"] == 2.0
    assert spec.flow["num_bins"] == 48
    layers = couplings(paper)
    assert len(layers) == 8
    splines = [
        isinstance(m, PiecewiseRationalQuadraticCouplingTransform) for m in layers
    ]
    assert splines == [True, False] * 4
    convolutions = [m for m in paper.net.modules() if isinstance(m, nn.Conv1d)]
    assert len(convolutions) == 9  # two streams and the noise stack
    for i, layer in enumerate(convolutions):
        assert layer.kernel_size == ((8,), (8,), (5,))[i % 3]
        assert layer.stride == ((2,), (2,), (1,))[i % 3]
        assert layer.out_channels == (32, 64, 128)[i % 3]
    encoding = paper.encode(torch.zeros(1, 8_120))
    assert encoding.cardinality.shape[-1] == 256
    assert float(paper.x_scale) == 1.0


def test_paper_preset_has_no_density(paper: SlotDensityEstimator) -> None:
    theta, x = batch(problems.sinusoids("paper"), 2)
    with pytest.raises(NotImplementedError, match="Use the default slot_nn"):
        paper.log_prob(theta, x)


def test_paper_preset_takes_the_ablations(tiny: problems.Sinusoids) -> None:
    builder = slot_nn.paper(
        tiny,
        domains=("time", "time"),
        phase_weight=1.0,
        frequency_weight=1.0,
        flow_layers=2,
        shared_head=False,
        flow_hidden_features=16,
        hidden_features=16,
    )
    estimator = build(tiny, builder)
    assert isinstance(estimator.chart, CircleChart)
    assert estimator.chart.phase_weight == 1.0
    assert len(couplings(estimator)) == 2
    assert estimator.spec.encoder is not None
    assert estimator.spec.encoder["domains"] == ["time", "time"]
    assert not estimator.spec.shared_head


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ({"matching": "ordered"}, lambda e: e.spec.matching == "ordered"),
        ({"mean_flow_loss": True}, lambda e: e.spec.mean_flow_loss),
        (
            {"trunk_features": None},
            lambda e: head(e).slots.num_features == 16 + 3 + 4,
        ),
        ({"trunk_features": 8}, lambda e: head(e).slots.num_features == 8),
        (
            {"slots": "global"},
            lambda e: isinstance(head(e).slots, GlobalSlots),
        ),
        (
            {"trunk_features": None, "condition_on_cardinality": False},
            lambda e: head(e).slots.num_features == 16 + 3,
        ),
        ({"flow_layers": 5}, lambda e: len(couplings(e)) == 5),
        ({"hidden_features": 24}, lambda e: e.spec.encoder["hidden_features"] == 24),
        (
            {"encoder_options": {"noise_stack": True}},
            lambda e: e.net.noise_stack is not None,
        ),
        ({"loss_weights": (1.0, 2.0, 3.0)}, lambda e: e.spec.loss_weights[2] == 3),
        ({"z_score_x": False}, lambda e: float(e.x_scale) == 1.0),
        ({"chart": "circle"}, lambda e: isinstance(e.chart, CircleChart)),
        (
            {"chart": "circle", "phase_weight": 4.0, "frequency_weight": 5.0},
            lambda e: (
                e.spec.chart.get("phase_weight") == 4.0
                and e.spec.chart.get("frequency_weight") == 5.0
            ),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_field_changes_what_it_names(
    tiny: problems.Sinusoids, change: dict[str, Any], read: Any
) -> None:
    # The problem's own domains, spelt out: slots are not anchored then.
    usual = {"domains": ("frequency", "time"), **SMALL}
    builder = slot_nn(tiny, **{**usual, **change})
    assert read(build(tiny, builder))
    assert not read(build(tiny, slot_nn(tiny, **usual)))


def test_default_asks_the_problem_for_chart_and_encoder(
    tiny: problems.Sinusoids,
) -> None:
    estimator = build(tiny, slot_nn(tiny))
    assert isinstance(estimator.chart, PolarChart)
    assert isinstance(estimator.net, TokenEncoder)
    assert isinstance(estimator.component_head, AutoregressiveHead)
    estimator = build(tiny, slot_nn(tiny, domains=("frequency", "time")))
    assert isinstance(estimator.net, DualStreamEncoder)
    assert isinstance(head(estimator).slots, AttentionSlots)
    linear = problems.linear_gaussian()
    estimator = build(linear, slot_nn(linear))
    assert isinstance(estimator.chart, WhiteningChart)
    assert isinstance(estimator.net, MLPEncoder)
    assert isinstance(head(estimator).slots, GlobalSlots)
    assert estimator.shared_head is None


def test_bare_prior_gets_a_whitening_chart_and_an_mlp(
    tiny: problems.Sinusoids,
) -> None:
    estimator = build(tiny, slot_nn(tiny.prior, **SMALL))
    assert isinstance(estimator.chart, WhiteningChart)
    assert isinstance(estimator.net, MLPEncoder)
    assert estimator.net.spec["hidden_features"] == 16


def test_chart_of_the_users_own_is_used(tiny: problems.Sinusoids) -> None:
    chart = WhiteningChart(tiny.prior.component_marginals)
    assert build(tiny, slot_nn(tiny, chart=chart)).chart.spec == chart.spec


def test_x_is_scaled_by_its_mean_and_standard_deviation(
    tiny: problems.Sinusoids,
) -> None:
    theta, x = batch(tiny)
    x = 7.0 * x + 3.0
    estimator = slot_nn(tiny, **SMALL)(theta, x)
    scaled = (x - estimator.x_shift) / estimator.x_scale
    assert float(scaled.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(scaled.std()) == pytest.approx(1.0, abs=1e-5)
    # an estimator that sees scaled x answers as one that sees x
    plain = slot_nn(tiny, **SMALL, z_score_x=False)(theta, x)
    state = estimator.state_dict()
    plain.load_state_dict(state | {"x_shift": plain.x_shift, "x_scale": plain.x_scale})
    torch.testing.assert_close(
        estimator.log_prob_cardinality(x), plain.log_prob_cardinality(scaled)
    )


def test_weights_follow_torchs_seed_only(tiny: problems.Sinusoids) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build(tiny, slot_nn(tiny, **SMALL)).state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_estimators_of_one_builder_share_no_weights(tiny: problems.Sinusoids) -> None:
    builder = slot_nn(tiny, **SMALL)
    assert not shared_weights(build(tiny, builder), build(tiny, builder))


def test_estimators_with_the_users_encoder_share_no_weights(
    tiny: problems.Sinusoids,
) -> None:
    # Else training one trains the other, and the same seed twice gives two results.
    options: dict[str, Any] = SMALL | {"encoder": nn.Linear(300, 8)}
    del options["hidden_features"]
    builder = slot_nn(tiny, **options)
    assert not shared_weights(build(tiny, builder), build(tiny, builder))


def shared_weights(first: nn.Module, second: nn.Module) -> set[int]:
    left, right = ({p.data_ptr() for p in m.parameters()} for m in (first, second))
    return left & right


def test_spec_survives_json(tiny: problems.Sinusoids) -> None:
    for builder in (slot_nn(tiny, **SMALL), slot_nn.paper(tiny, hidden_features=16)):
        spec = build(tiny, replace(builder, flow_hidden_features=16)).spec
        entries = json.loads(json.dumps(spec.to_json()))
        assert entries == spec.to_json()
        assert EstimatorSpec.from_json(entries).to_json() == entries


def test_builder_cannot_be_changed_in_place(tiny: problems.Sinusoids) -> None:
    with pytest.raises(FrozenInstanceError):
        slot_nn(tiny).matching = "ordered"  # pyright: ignore[reportAttributeAccessIssue]


def test_missing_problem_is_refused(tiny: problems.Sinusoids) -> None:
    with pytest.raises(ValueError, match="needs to know the layout of theta"):
        slot_nn()(*batch(tiny))


@pytest.mark.parametrize("name", ["phase_weight", "frequency_weight"])
def test_weights_without_the_papers_chart_are_refused(
    tiny: problems.Sinusoids, name: str
) -> None:
    builder = replace(slot_nn(tiny), **{name: 2.0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match='set chart="circle"'):
        build(tiny, builder)


@pytest.mark.parametrize(
    "options",
    [{"domains": ("time", "time")}, {"encoder_options": {"noise_stack": True}}],
)
def test_encoder_options_beside_an_encoder_are_refused(
    tiny: problems.Sinusoids, options: dict[str, Any]
) -> None:
    builder = slot_nn(tiny, encoder=nn.Linear(300, 8), **options)
    with pytest.raises(ValueError, match="it needs the problem's own encoder"):
        build(tiny, builder)


def test_circle_chart_without_a_phase_is_refused() -> None:
    problem = problems.linear_gaussian()
    with pytest.raises(ValueError, match="three parameters"):
        build(problem, slot_nn(problem, chart="circle"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, x: (t[:, :-1], x), ValueError, "theta must have 11 entries"),
        (lambda t, x: (t * float("nan"), x), ValueError, "theta must be finite"),
        (lambda t, x: (t.long(), x), TypeError, "theta must be a floating-point"),
        (lambda t, x: (t, x.unsqueeze(1)), ValueError, "x must have shape"),
        (lambda t, x: (t, x[:, :-1]), ValueError, "x must have|300"),
        (lambda t, x: (t, x * float("nan")), ValueError, "x must be finite"),
        (lambda t, x: (t, x.long()), TypeError, "x must be a floating-point"),
        (lambda t, x: (t, x[:3]), ValueError, "theta and x|batch"),
    ],
    ids=[
        "short theta",
        "nan theta",
        "int theta",
        "3-d x",
        "short x",
        "nan x",
        "int x",
        "fewer x",
    ],
)
def test_malformed_batches_are_refused(
    tiny: problems.Sinusoids, change: Any, error: type[Exception], message: str
) -> None:
    theta, x = change(*batch(tiny))
    with pytest.raises(error, match=message):
        slot_nn(tiny, **SMALL)(theta, x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("matching", "hungarain"),
        ("flow_network", "resnet"),
        ("chart", "circel"),
        ("domains", ("frequency", "wavelet")),
    ],
)
def test_a_misspelt_choice_is_refused(
    tiny: problems.Sinusoids, name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=name.removeprefix("flow_").rstrip("s")):
        build(tiny, slot_nn(tiny, **{**SMALL, name: value}))


def test_a_prior_of_one_parameter_makes_an_estimator() -> None:
    prior = VariableKPrior(BoxUniform(torch.zeros(1), torch.ones(1)), [1, 1, 1])
    theta = prior.sample((20,))
    x = theta.sum(-1, keepdim=True) + torch.randn(20, 4)
    estimator = slot_nn(prior, **SMALL)(theta, x)
    assert estimator.loss(theta, x).isfinite().all()
    assert prior.support.check(estimator.sample((5,), x)).all()


def test_attention_slots_need_tokens() -> None:
    linear = problems.linear_gaussian()
    with pytest.raises(ValueError, match=r"need an encoder that returns .* tokens"):
        build(linear, slot_nn(linear, slots="attention"))


# --- no option is ignored

NETWORKS: dict[str, dict[str, Any]] = {
    "default": {},
    "Laplace": {"flow_layers": 0},
    "no fit": {"refine_slots": 0},
    "factorised": {"coupling": "factorised"},
    "attention": {"slots": "attention"},
    "global": {"slots": "global"},
    "circle": {"slots": "global", "chart": "circle"},
    "no layers": {"slots": "global", "flow_layers": 0},
    "own encoder": {"encoder": nn.Linear(300, 8)},
    "no shared parameters": {"problem": problems.linear_gaussian()},
}
CHANGES: dict[str, Any] = {
    "chart": "circle",
    "encoder": None,  # made to fit
    "slots": "global",
    "flow_layers": 2,
    "mean_flow_loss": True,
    "z_score_x": False,
    "loss_weights": (1.0, 1.0, 2.0),
    "shared_head": False,
    "hidden_features": 24,
    "encoder_options": {"num_heads": 2},
    "domains": ("time", "time"),
    "coupling": "factorised",
    "refine_slots": 1,
    "weighed_sets": 1,
    "matching": "permanent",
    "condition_on_cardinality": False,
    "location_scale": False,
    "trunk_features": 24,
    "flow_hidden_features": 24,
    "flow_bins": 4,
    "flow_blocks": 2,
    "flow_network": "residual",
    "tail_bound": 2.0,
    "phase_weight": 3.0,
    "frequency_weight": 3.0,
}


def test_512_sets_of_cells_are_weighed_unless_told_otherwise(tiny) -> None:
    for given, expected in ((None, 512), (0, 0), (7, 7)):
        builder = slot_nn(tiny, weighed_sets=given, **SMALL)
        found = build(tiny, builder).component_head
        assert isinstance(found, AutoregressiveHead)
        assert found.weighed_sets == expected


def answers(builder: slot_nn) -> list[Tensor]:
    """Numbers of a network with given random weights: parameters, losses, draws."""
    problem = builder.problem
    assert isinstance(problem, problems.Problem)
    theta, x = batch(problem, 16)
    # K > 1 throughout, where matchings and means differ.
    weights = (torch.arange(problem.layout.max_cardinality + 1) > 1).float()
    prior = problem.prior.with_cardinality(weights)
    theta = prior.sample((16,), torch.Generator().manual_seed(3))
    x = problem.simulator(theta, torch.Generator().manual_seed(4))
    torch.manual_seed(0)
    estimator = builder(theta, x)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        losses = estimator.loss(theta, x)
        draws = estimator.sample((8,), x[:2], generator=generator)
    return [*estimator.state_dict().values(), losses, draws]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(first, second, strict=True)
    )


@functools.cache
def usual_answers(network: str) -> list[Tensor]:
    options: dict[str, Any] = {"problem": problems.sinusoids("tiny")}
    return answers(slot_nn(**(options | NETWORKS[network])))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changes_the_network_or_is_refused(network: str, name: str) -> None:
    options: dict[str, Any] = {"problem": problems.sinusoids("tiny")}
    options |= NETWORKS[network]
    value = CHANGES[name]
    if name == "slots" and network in ("own encoder", "no shared parameters"):
        value = "attention"  # global is what they have
    if name == "encoder":
        value = nn.Linear(options["problem"].num_data, 9)
    if options.get(name) == value:
        return  # what this network is made of
    try:
        changed = answers(slot_nn(**{**options, name: value}))
    except (TypeError, ValueError):
        return
    assert not same(changed, usual_answers(network)), f"{name} changes nothing"


def test_an_option_left_at_its_default_changes_nothing() -> None:
    # Else the test above could not fail.
    options: dict[str, Any] = {"problem": problems.sinusoids("tiny")}
    options["mean_flow_loss"] = False
    assert same(answers(slot_nn(**options)), usual_answers("default"))


def test_every_option_is_tried() -> None:
    assert {field.name for field in fields(slot_nn)} == {"problem", *CHANGES}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("hidden_features", 0, ValueError),
        ("trunk_features", 0, ValueError),
        ("flow_layers", -1, ValueError),
        ("flow_layers", 1.5, TypeError),
        ("flow_layers", True, TypeError),
        ("flow_bins", 1, ValueError),
        ("flow_blocks", 0, ValueError),
        ("tail_bound", math.nan, ValueError),
        ("tail_bound", -1.0, ValueError),
        ("phase_weight", math.inf, ValueError),
        ("loss_weights", (1.0, math.nan, 1.0), ValueError),
        ("loss_weights", (1.0, -1.0, 1.0), ValueError),
        ("loss_weights", (1.0, 1.0), ValueError),
        ("loss_weights", (0.0, 0.0, 0.0), ValueError),
        ("shared_head", "no", TypeError),
        ("z_score_x", 1, TypeError),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(
    name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=name):
        slot_nn(problems.sinusoids("tiny"), **{name: value})


def test_no_options_for_the_encoder_change_nothing() -> None:
    problem = problems.sinusoids("tiny")
    theta = problem.prior.sample((4,))
    x = problem.simulator(theta)
    built = [slot_nn(problem, encoder_options=o)(theta, x) for o in (None, {})]
    assert built[0].spec == built[1].spec


def pulses(**changes: Any) -> problems.Trace:
    """Pulses of fluxes with a mean and a width that all share."""

    def component(shared: Tensor) -> list[Distribution]:
        mean, width = shared.unbind(-1)
        return [Uniform(0.0, 16.0), LogNormal(mean, width)]

    def pulse(components: Tensor) -> Tensor:
        away = torch.arange(16.0).to(components) + 0.5 - components[..., :1]
        return components[..., 1:] * torch.exp(-0.5 * away.square())

    low, high = torch.tensor([0.0, 0.1]), torch.tensor([1.0, 0.5])
    prior = VariableKPrior(
        component,
        [1.0, 1.0, 1.0],
        shared=Independent(Uniform(low, high), 1),
        component_names=("time", "flux"),
        shared_names=("mean", "width"),
    )
    simulator = AdditiveSimulator(pulse, WhiteNoise(0.3), prior.layout)
    return problems.Trace("pulses", prior, simulator, cells=8, **changes)


def test_shared_parameters_of_a_population_see_its_components(tmp_path) -> None:
    """A file holds no function: the network alone is rebuilt from it."""
    problem = pulses()
    theta, x = batch(problem)
    estimator = slot_nn(problem, **SMALL)(theta, x).eval()
    assert estimator.spec.sees_components
    assert estimator.spec.slots["weighed_sets"] == 0
    assert not estimator.has_evidence
    path = tmp_path / "pulses.safetensors"
    estimator.save(path)
    fit = problem.build_fit()
    again = SlotDensityEstimator.load(path, fit=fit)
    assert torch.equal(again.log_prob(theta, x), estimator.log_prob(theta, x))
    drawn = estimator.sample((3,), x)
    assert torch.isfinite(problem.prior.log_prob(drawn)).all()
    posterior = SlotPosterior(estimator, problem.prior, problem.simulator)
    with pytest.raises(TypeError, match="takes components as independent"):
        posterior.with_evidence()


def test_files_of_other_networks_stay_as_they_were(tiny) -> None:
    theta, x = batch(tiny)
    spec = slot_nn(tiny, **SMALL)(theta, x).spec
    assert not spec.sees_components
    entries = spec.to_json()
    assert "sees_components" not in entries
    assert EstimatorSpec.from_json(entries).to_json() == entries


def test_options_that_do_not_go_with_a_population_are_refused() -> None:
    problem = pulses()
    theta, x = batch(problem)
    builder = slot_nn(problem, **SMALL)
    for other in (
        replace(builder, shared_head=False),
        replace(builder, weighed_sets=8),
    ):
        with pytest.raises(ValueError, match=r"shared_head=False|weighed_sets must"):
            other(theta, x)

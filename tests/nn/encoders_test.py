"""Encoders and their front ends, against numpy's Fourier transform and formulas."""

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbi_slotflow import problems
from sbi_slotflow.nn.encoders import Encoding, MLPEncoder, TraceTokens, encode
from sbi_slotflow.nn.paper import DualStreamEncoder, make_front_end
from sbi_slotflow.nn.spec import build

DOMAINS = ("time", "frequency", "time-frequency")
LENGTHS = (90, 64)
WIDTH = 16


def dual(**options: Any) -> DualStreamEncoder:
    small: dict[str, Any] = {
        "channels": (8, 8, 8),
        "kernels": (5, 5, 3),
        "strides": ((1, 1, 1), (2, 2, 1)),
        "num_heads": 2,
        "hidden_features": WIDTH,
    }
    lengths = options.pop("lengths", LENGTHS)
    return DualStreamEncoder(lengths, **{**small, **options})


ENCODERS: dict[str, dict[str, Any]] = {
    **{f"{a}, {b}": {"domains": (a, b)} for a, b in product(DOMAINS, DOMAINS)},
    "noise stack": {"noise_stack": True},
    "wide context": {"context_features": 24},
    "residual": {"residual": True},
    "centred phase": {"centre_phase": True},
    "band": {"bands": ((10, 30), None), "centre_phase": True},
    "one stream": {
        "lengths": (154,),
        "domains": ("frequency",),
        "strides": ((2, 1, 1),),
    },
}


def data(num: int = 6, length: int = sum(LENGTHS)) -> Tensor:
    return torch.randn(num, length, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[*ENCODERS, "mlp"])
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "mlp":
        return MLPEncoder(sum(LENGTHS), hidden_features=WIDTH)
    return dual(**ENCODERS[request.param])


def embeddings(encoding: Encoding) -> list[Tensor]:
    return [e for e in encoding if e is not None]


def test_embeddings_have_the_widths_that_were_asked_for(encoder: nn.Module) -> None:
    encoding = encode(encoder, data())
    assert all(e.isfinite().all() for e in embeddings(encoding))
    wide = getattr(encoder, "spec", {}).get("context_features", WIDTH)
    assert encoding.context.shape == (6, wide)
    assert encoding.cardinality.shape == (6, WIDTH)
    assert encoding.shared.shape[0] == 6


def test_rows_do_not_influence_each_other(encoder: nn.Module) -> None:
    x = data()
    together = encode(encoder, x)
    for i in range(len(x)):
        alone = encode(encoder, x[i : i + 1])
        for one, all_ in zip(embeddings(alone), embeddings(together), strict=True):
            torch.testing.assert_close(one[0], all_[i], rtol=1e-4, atol=1e-5)


def test_every_parameter_receives_a_gradient(encoder: nn.Module) -> None:
    encoding = encode(encoder, data(16))
    parameters = dict(encoder.named_parameters())
    total = sum((e.square().sum() for e in embeddings(encoding)), torch.zeros(()))
    gradients = torch.autograd.grad(total, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient.isfinite().all(), name
        assert (gradient != 0).any(), name


def test_spec_survives_json_and_rebuilds_the_architecture(encoder: nn.Module) -> None:
    spec = json.loads(json.dumps(encoder.spec))
    rebuilt = build("encoder", spec)
    assert rebuilt.spec == encoder.spec
    rebuilt.load_state_dict(encoder.state_dict())
    pairs = zip(
        embeddings(encode(rebuilt, data())),
        embeddings(encode(encoder, data())),
        strict=True,
    )
    for left, right in pairs:
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("noise_stack", [False, True])
def test_cardinality_reads_the_first_stream_only_and_slots_read_both(
    noise_stack: bool,
) -> None:
    encoder, x = dual(noise_stack=noise_stack), data()
    before = encode(encoder, x)
    second = x.clone()
    second[:, LENGTHS[0] :] += 1.0
    first = x.clone()
    first[:, : LENGTHS[0]] += torch.linspace(-1, 1, LENGTHS[0])
    after_first, after_second = encode(encoder, first), encode(encoder, second)
    assert torch.equal(after_second.cardinality, before.cardinality)
    assert not torch.allclose(after_first.cardinality, before.cardinality)
    assert not torch.allclose(after_first.context, before.context)
    assert not torch.allclose(after_second.context, before.context)
    # a noise stack of its own reads the first stream, as the paper's does
    assert torch.equal(after_second.shared, before.shared) == noise_stack
    assert not torch.allclose(after_first.shared, before.shared)


def test_positions_tell_shifted_streams_apart() -> None:
    # Moving a pulse that stays away from the ends changes nothing but positions.
    encoder = dual(lengths=(128,), domains=("time",), strides=((1, 1, 1),))
    x = torch.zeros(2, 128)
    x[0, 40], x[1, 80] = 1.0, 1.0
    first, second = encode(encoder, x).context
    for name, buffer in encoder.named_buffers():
        if name.endswith("positions"):
            buffer.zero_()
    blind_first, blind_second = encode(encoder, x).context
    torch.testing.assert_close(blind_first, blind_second, rtol=0, atol=1e-4)
    assert (first - second).norm() > 10 * (blind_first - blind_second).norm()


def test_positions_are_those_of_equation_6() -> None:
    encoder = dual(lengths=(40,), domains=("time",), strides=((1, 1, 1),))
    stack = encoder.stacks[0]
    for parameter in stack.parameters():
        nn.init.zeros_(parameter)
    tokens = stack(torch.zeros(1, 40))[0]
    width = tokens.shape[-1]
    for position, channel in product(range(len(tokens)), range(width)):
        angle = position / 10_000 ** (2 * (channel // 2) / width)
        expected = math.cos(angle) if channel % 2 else math.sin(angle)
        assert tokens[position, channel].item() == pytest.approx(expected, abs=1e-5)


def test_a_plain_tensor_serves_all_readers() -> None:
    encoding = encode(nn.Linear(3, 5), torch.ones(2, 3))
    assert isinstance(encoding, Encoding)
    assert all(e is encoding.context for e in encoding[:3])
    assert encoding.tokens is None


@pytest.mark.parametrize("preset", ["tiny", "paper", "crowded"])
def test_encoders_of_the_problems_read_their_data(preset: Any) -> None:
    problem = problems.sinusoids(preset)
    encoder = problem.build_encoder(channels=(4, 4, 4), hidden_features=WIDTH)
    encoding = encode(encoder, data(2, problem.num_data))
    assert encoding.context.shape == encoding.cardinality.shape == (2, WIDTH)
    # the band is kept at full resolution, with a margin
    low, high = problem.prior.component_marginals[2].bounds
    assert isinstance(encoder, DualStreamEncoder)
    first, last = encoder.spec["bands"][0]
    duration = problem.grids[0].duration
    assert first < low * duration
    assert last > high * duration
    assert encoder.spec["strides"][0] == [1, 1, 1]


@pytest.mark.parametrize("length", [64, 65])
def test_frequency_domain_is_numpys_orthonormal_fft(length: int) -> None:
    x = data(3, length)
    real, imag = make_front_end("frequency", length)(x).unbind(-2)
    expected = np.fft.rfft(x.double().numpy(), norm="ortho")
    np.testing.assert_allclose(real, expected.real, atol=1e-5)
    np.testing.assert_allclose(imag, expected.imag, atol=1e-5)


@pytest.mark.parametrize("length", [64, 65])
def test_centred_phase_is_referred_to_the_middle_of_the_record(length: int) -> None:
    time = torch.arange(length) - (length - 1) / 2
    bins = torch.arange(length // 2 + 1)
    front_end = make_front_end("frequency", length, centre_phase=True)
    for phase in (0.0, 1.0):
        # on a bin: that bin is a positive number times exp(i phase)
        x = torch.cos(2 * math.pi * 9 / length * time + phase).unsqueeze(0)
        real, imag = front_end(x)[0]
        assert math.atan2(imag[9], real[9]) == pytest.approx(phase, abs=1e-4)
        others = torch.complex(real, imag)[bins != 9].abs()
        assert others.max() < 1e-4
    # a turn only: magnitudes are those of the plain transform
    x = data(2, length)
    torch.testing.assert_close(
        front_end(x).norm(dim=-2),
        make_front_end("frequency", length)(x).norm(dim=-2),
    )


def test_neighbouring_bins_of_a_centred_tone_have_no_phase_ramp() -> None:
    length = 200
    time = torch.arange(length) - (length - 1) / 2
    x = torch.cos(2 * math.pi * 40.3 / length * time + 0.5).unsqueeze(0)
    real, imag = make_front_end("frequency", length, centre_phase=True)(x)[0]
    spectrum = torch.complex(real, imag)[38:43]
    phases = torch.angle(spectrum.square()) / 2  # up to sign
    torch.testing.assert_close(phases, torch.full((5,), 0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize("centre_phase", [False, True])
def test_band_keeps_its_bins_and_adds_the_level_outside(centre_phase: bool) -> None:
    x = data(3, 100)
    everything = make_front_end("frequency", 100, centre_phase)(x)
    cut = make_front_end("frequency", 100, centre_phase, band=(10, 19))(x)
    assert cut.shape == (3, 3, 10)
    torch.testing.assert_close(cut[:, :2], everything[..., 10:20])
    outside = torch.cat([everything[..., :10], everything[..., 20:]], -1)
    level = outside.square().mean((-2, -1)).sqrt().log()
    torch.testing.assert_close(cut[:, 2], level.unsqueeze(-1).expand(3, 10))


@pytest.mark.parametrize("band", [(0, 50), (0, 49), (1, 50)])
def test_a_band_up_to_its_limits_is_read_without_nan(band: tuple[int, int]) -> None:
    front_end = make_front_end("frequency", 100, band=band)
    assert front_end(data(2, 100)).isfinite().all()


def test_the_level_outside_a_band_follows_the_scale_of_the_data() -> None:
    front_end, x = make_front_end("frequency", 100, band=(10, 19)), data(3, 100)
    for scale in (1e-21, 1e15):
        level = front_end(scale * x)[:, 2]
        expected = front_end(x)[:, 2] + math.log(scale)
        torch.testing.assert_close(level, expected, rtol=1e-5, atol=0)
    assert front_end(torch.zeros(1, 100)).isfinite().all()


def test_the_level_of_a_trace_follows_the_scale_of_the_data() -> None:
    tokens, x = TraceTokens(64, 8), data(3, 64)
    level, relative = tokens(x)[1], tokens(x)[0][..., 8:16]
    for scale in (1e-21, 1e15):
        values, other, _ = tokens(scale * x)
        torch.testing.assert_close(other, level + math.log(scale), rtol=1e-5, atol=0)
        torch.testing.assert_close(values[..., 8:16], relative)
    assert tokens(torch.zeros(1, 64))[0].isfinite().all()


def test_time_domain_is_the_stream() -> None:
    x = data(3, 40)
    torch.testing.assert_close(make_front_end("time", 40)(x)[:, 0], x, rtol=0, atol=0)


@pytest.mark.parametrize("length", [64, 100, 200])
def test_time_frequency_domain_is_the_fft_of_hann_windows(length: int) -> None:
    x = data(2, length).double()
    front_end = make_front_end("time-frequency", length).double()
    result = front_end(x).numpy()
    assert result.shape[1] == front_end.channels
    width = front_end.channels - 2
    hop = width // 2
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    padded = np.pad(x.numpy(), ((0, 0), (width // 2, width // 2)), mode="reflect")
    for frame in range(result.shape[-1]):
        piece = padded[:, frame * hop : frame * hop + width] * window
        spectrum = np.fft.rfft(piece) / math.sqrt(width)
        expected = np.concatenate([spectrum.real, spectrum.imag], axis=-1)
        np.testing.assert_allclose(result[..., frame], expected, atol=1e-6)


@pytest.mark.parametrize("domain", DOMAINS)
def test_front_ends_announce_their_channels(domain: str) -> None:
    for band in (None, (5, 20)):
        front_end = make_front_end(domain, 90, band=band)
        assert front_end(data(2, 90)).shape[:2] == (2, front_end.channels)


def test_unknown_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="domain must be one of"):
        make_front_end("wavelet", 64)
    with pytest.raises(ValueError, match="domain must be one of"):
        dual(domains=("frequency", "wavelet"))


@pytest.mark.parametrize("band", [(-1, 5), (5, 5), (9, 3), (0, 51)])
def test_impossible_band_is_refused(band: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"two ascending bins within 0\.\.50"):
        make_front_end("frequency", 100, band=band)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("domains", ("time",)),
        ("strides", ((1, 1, 1),)),
        ("bands", (None, None, None)),
    ],
)
def test_each_stream_needs_its_own_options(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must have one entry for each"):
        dual(**{name: value})


def test_the_dual_encoder_is_the_papers_unless_told_otherwise() -> None:
    spec = DualStreamEncoder((3000, 5120)).spec
    expected = {
        "domains": ["frequency", "time"],
        "channels": [32, 64, 128],
        "kernels": [8, 8, 5],
        "strides": [[2, 2, 1], [2, 2, 1]],
        "num_heads": 4,
        "hidden_features": 256,
    }
    assert spec | expected == spec


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="encoder kind must be one of"):
        build("encoder", {"kind": "transformer"})


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

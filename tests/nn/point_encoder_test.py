"""The encoder of points: neither order nor padding matters."""

import pytest
import torch
from torch import Tensor

from sbi_slotflow.nn.encoders import Encoding
from sbi_slotflow.nn.point_encoder import AttendTo, PointEncoder, waves
from sbi_slotflow.nn.spec import build, describe
from sbi_slotflow.seeding import generator_for


def encoder(num: int = 12) -> PointEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PointEncoder(num, 3, [1.0, -2.0], [0.5, 3.0], width=16).eval()


def some_sets(num: int = 12) -> Tensor:
    x = torch.randn(4, num, 3, generator=generator_for(1))
    x[..., -1] = 1.0
    x[1, 5:] = 0.0
    x[2] = 0.0
    return x


def assert_same(first: Encoding, second: Encoding) -> None:
    for a, b in zip(first[:4], second[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_order_of_points_does_not_matter() -> None:
    x, order = some_sets(), torch.randperm(12, generator=generator_for(2))
    assert_same(encoder()(x), encoder()(x[:, order]))


@torch.no_grad()
def test_padding_does_not_matter() -> None:
    x = some_sets()
    longer = torch.cat([x, torch.zeros(4, 5, 3)], 1)
    assert_same(encoder()(x), encoder()(longer))
    found = encoder()(some_sets())
    assert all(part is None or part.isfinite().all() for part in found)


@torch.no_grad()
def test_points_and_their_number_do_matter() -> None:
    x = some_sets()[:1]
    moved, fewer, twice = x.clone(), x.clone(), torch.cat([x, x], 1)
    moved[0, 3, 0] += 0.3
    fewer[0, 3] = 0.0
    for other in (moved, fewer, twice):
        assert (encoder()(x).context - encoder()(other).context).abs().max() > 1e-3


@torch.no_grad()
def test_far_points_are_read_without_overflow() -> None:
    x = some_sets()
    x[0, 0, 0] = 1e30
    assert encoder()(x).context.isfinite().all()


def test_it_comes_back_from_its_description() -> None:
    spec = describe("encoder", encoder())
    assert spec is not None
    again = build("encoder", spec)
    again.load_state_dict(encoder().state_dict())
    assert_same(again(some_sets()), encoder()(some_sets()))


def test_causal_attention_sees_nothing_after() -> None:
    layer = AttendTo(16)
    z = torch.randn(3, 5, 16, generator=generator_for(3))
    other = z.clone()
    other[:, 3:] += 1.0
    first, second = (layer(part, part, causal=True) for part in (z, other))
    torch.testing.assert_close(first[:, :3], second[:, :3])
    assert (first[:, 3:] - second[:, 3:]).abs().min() > 0


def test_waves_are_coordinates_and_their_phases() -> None:
    z = torch.tensor([[0.5, -1.0]])
    found = waves(z)
    assert found.shape == (1, 22)
    torch.testing.assert_close(found[:, :2], z)
    # the longest wave has a length of 4
    torch.testing.assert_close(waves(z + 4.0)[:, 2:], found[:, 2:], rtol=0, atol=1e-4)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(B, n, 3\)"):
        encoder()(torch.zeros(4, 12, 2))
    with pytest.raises(ValueError, match="location must be 2 numbers"):
        PointEncoder(12, 3, [1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="multiple of 4 heads"):
        PointEncoder(12, 3, [1.0, 1.0], [1.0, 1.0], width=18)

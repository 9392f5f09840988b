from contextlib import suppress

import torch

from sbi_slotflow.seeding import draw_seed, forked_rng, generator_for


def test_forked_code_draws_from_the_generator_and_leaves_the_global_one() -> None:
    state = torch.random.get_rng_state()
    draws = []
    for _ in range(2):
        torch.manual_seed(len(draws) + 100)
        with forked_rng(torch.Generator().manual_seed(1)):
            draws.append(torch.rand(5))
    assert torch.equal(draws[0], draws[1])
    torch.random.set_rng_state(state)
    generator = torch.Generator().manual_seed(1)
    with forked_rng(generator):
        torch.rand(5)
    assert torch.equal(torch.random.get_rng_state(), state)
    with forked_rng(generator):
        assert not torch.equal(torch.rand(5), draws[0])


def test_the_global_state_is_put_back_after_an_error() -> None:
    state = torch.random.get_rng_state()
    with suppress(KeyError), forked_rng(torch.Generator()):
        torch.rand(5)
        raise KeyError
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_a_generator_the_global_one_moves_on() -> None:
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    with forked_rng(None):
        assert torch.equal(torch.rand(5), expected)
    torch.manual_seed(3)
    first = draw_seed(None)
    assert draw_seed(None) != first


def test_streams_are_reproducible_and_all_different() -> None:
    streams = [(s, *rest) for s in range(20) for rest in [(), (0,), (1,), (0, 0)]]
    streams += [(0, step) for step in range(2, 2000)]
    seeds = [generator_for(*stream).initial_seed() for stream in streams]
    assert len(set(seeds)) == len(streams)
    assert [generator_for(*stream).initial_seed() for stream in streams] == seeds


def test_neighbouring_streams_are_uncorrelated() -> None:
    draws = torch.stack(
        [torch.randn(1000, generator=generator_for(0, i)) for i in range(50)]
    )
    correlation = torch.corrcoef(draws) - torch.eye(50)
    # 1,225 correlations, each beyond 7 standard errors in 3 of 10^12 seeds
    assert correlation.abs().max() < 7 / 1000**0.5

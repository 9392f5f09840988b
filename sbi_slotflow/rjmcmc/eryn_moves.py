r"""Moves for Eryn's sampler: births, deaths and updates of components.

:class:`SlotFlowMove` draws components from a density q(theta | x, K), for one that of
a trained posterior's draws, and accepts with Eryn's ratio times

.. math::
    1 / q(\theta' | x, K + 1) \;\text{(birth)}, \quad
    q(\theta | x, K) \;\text{(death)}, \quad
    q(\theta | x, K) / q(\theta' | x, K) \;\text{(update)}

A birth and the death that undoes it use the density of the larger K.

:class:`ComponentStretchMove` is Goodman and Weare's stretch, one component at a time.
Eryn's own ``StretchMove`` is wrong beside reversible jumps: it stretches all Kmax
leaves, those not in use included, and its factor z^(n - 1) counts the dimensions of
all, so that the leaves in use do not keep their distribution.
"""

import importlib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..nn.charts import WhiteningChart
from ..posterior.base import Posterior
from ..posterior.component_proposals import ComponentProposal, PooledComponents
from ..seeding import generator_for
from ..sets.checks import Numbers
from ..sets.multi_class import MultiClassPrior
from ..sets.prior import VariableKPrior


def require_eryn() -> None:
    """Import Eryn, an optional dependency, into today's surroundings.

    Eryn 1.2.6 calls ``numpy.in1d``, which numpy 2.4 no longer has, and imports ArviZ,
    whose plots use ``matplotlib.style.core`` without importing it, which matplotlib
    3.11 no longer does by itself. Both names are put back where they are missing.

    Raises:
        ImportError: If Eryn is not installed.
    """
    if not hasattr(np, "in1d"):
        setattr(np, "in1d", np.isin)  # noqa: B010  numpy's stubs know no such name
    with warnings.catch_warnings(), suppress(ImportError):
        warnings.simplefilter("ignore")  # the module is deprecated
        importlib.import_module("matplotlib.style.core")
    try:
        importlib.import_module("eryn.ensemble")
    except ImportError as error:
        raise ImportError(
            "Eryn is needed for this sampler: pip install sbi-slotflow[rjmcmc]."
        ) from error


require_eryn()

from eryn.moves import MHMove, ReversibleJumpMove  # noqa: E402

__all__ = ["ComponentStretchMove", "SlotFlowMove", "leaf_limits", "require_eryn"]

# Names of the branches.
COMPONENTS, SHARED = "components", "shared"

Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]


def members_of(prior: VariableKPrior) -> dict[str, VariableKPrior]:
    """The prior of each branch of components by its name: one a class.

    Raises:
        ValueError: If a class has the name of the branch of shared parameters.
    """
    if not isinstance(prior, MultiClassPrior):
        return {COMPONENTS: prior}
    if SHARED in prior.classes:
        raise ValueError(f"no class may have the name {SHARED!r}: a branch has it.")
    return dict(prior.classes)


def leaf_limits(prior: VariableKPrior) -> tuple[dict[str, int], dict[str, int]]:
    """Return Eryn's ``nleaves_min`` and ``nleaves_max`` of a prior's branches.

    Raises:
        ValueError: If a cardinality between two possible ones is impossible: births
            and deaths, one at a time, could not cross it.
    """
    low, high = {}, {}
    for c, (name, member) in enumerate(members_of(prior).items()):
        possible = member.cardinality_probs > 0
        if isinstance(prior, MultiClassPrior):
            # With some number of the others; which ones the prior itself says.
            others = [d for d in range(prior.log_joint.ndim) if d != c]
            possible = prior.log_joint.isfinite()
            possible = possible.movedim(c, 0).flatten(1).any(-1) if others else possible
        support = possible.nonzero().squeeze(-1).tolist()
        if len(support) != support[-1] - support[0] + 1:
            raise ValueError(
                "the prior's cardinalities must be consecutive, as births and deaths "
                f"change K by one, got positive weights at K = {support}."
            )
        low[name], high[name] = support[0], support[-1]
        if name == COMPONENTS:
            high[name] = prior.max_cardinality
    shared = {SHARED: 1} if prior.layout.num_shared else {}
    return low | shared, high | shared


class SlotFlowMove(ReversibleJumpMove):
    """Births, deaths and updates of one component, drawn from a given density.

    Args:
        proposal: The density, the same for all K or one for each K = 1..Kmax.
        nleaves_min: Least number of leaves of every branch, as in all of Eryn's
            reversible-jump moves; :func:`leaf_limits` gives both for a prior.
        nleaves_max: Largest number of leaves of every branch.
        branch: The branch that holds the components, its parameters in the proposal's
            order.
        update_share: Share of steps that replace a component instead of changing K.
        kwargs: Options of Eryn's ``Move``.

    Raises:
        TypeError: If a proposal lacks ``sample_component`` or ``log_prob_component``.
        ValueError: If ``update_share`` is not in [0, 1), the branch has no limits, or
            there is not one proposal for each K.
    """

    def __init__(
        self,
        proposal: ComponentProposal | Sequence[ComponentProposal],
        nleaves_min: dict[str, int],
        nleaves_max: dict[str, int],
        branch: str = COMPONENTS,
        update_share: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if branch not in nleaves_min or branch not in nleaves_max:
            raise ValueError(
                f"nleaves_min and nleaves_max must have an entry for branch {branch!r},"
                f" got {sorted(nleaves_min)} and {sorted(nleaves_max)}."
            )
        if not 0 <= update_share < 1:
            raise ValueError(f"update_share must lie in [0, 1), got {update_share}.")
        most = nleaves_max[branch]
        each = proposal if isinstance(proposal, Sequence) else [proposal] * most
        if len(each) != most:
            raise ValueError(
                f"proposal must hold one density for each K = 1..{most}, got "
                f"{len(each)}."
            )
        for one in each:
            if not isinstance(one, ComponentProposal):
                raise TypeError(
                    "proposal must have sample_component and log_prob_component, got "
                    f"{type(one).__name__}."
                )
        super().__init__(nleaves_max=nleaves_max, nleaves_min=nleaves_min, **kwargs)
        self.branch, self.update_share = branch, update_share
        # the distinct proposals, and which of them serves K = 0 (never asked), 1, ...
        found = {id(one): one for one in each}
        self._proposals = list(found.values())
        self._proposal_of = np.array([0, *(list(found).index(id(one)) for one in each)])

    @classmethod
    def from_posterior(
        cls,
        posterior: Posterior,
        x: Numbers | None = None,
        prior_share: float = 0.1,
        num_samples: int = 10_000,
        seed: int = 0,
        branch: str = COMPONENTS,
        **kwargs: Any,
    ) -> "SlotFlowMove":
        """Make the move from the components in a posterior's draws.

        Args:
            posterior: A posterior with a prior.
            x: The observation; the posterior's default x if None.
            prior_share: Share of the prior in the proposal, in (0, 1].
            num_samples: Draws to learn the proposal from.
            seed: Seed of the draws.
            branch: The class of the components, where there are several.
            kwargs: Options of the move. The limits are the posterior's prior's unless
                ``nleaves_min`` and ``nleaves_max`` are given.

        Raises:
            TypeError: If posterior is no ``Posterior``.
            ValueError: If x is not one observation, or the share is out of range.
        """
        if not isinstance(posterior, Posterior):
            raise TypeError(
                f"posterior must be a Posterior, got {type(posterior).__name__}."
            )
        theta = posterior.sample((num_samples,), x, generator=generator_for(seed))
        members = members_of(posterior.prior)
        if branch not in members:
            raise ValueError(f"branch must be one of {list(members)}, got {branch!r}.")
        theta, chart = theta.cpu(), posterior.chart
        prior = deepcopy(members[branch]).to("cpu")
        if isinstance(posterior.prior, MultiClassPrior):
            theta = posterior.prior.layout.view(theta, branch)
            chart = WhiteningChart(prior.component_marginals)
        pooled = PooledComponents(theta, prior, prior_share, chart)
        low, high = leaf_limits(posterior.prior)
        options = {"nleaves_min": low, "nleaves_max": high, **kwargs}
        return cls(pooled, branch=branch, **options)

    def get_proposal(
        self,
        all_coords: Arrays,
        all_inds: Arrays,
        nleaves_min_all: dict[str, int],
        nleaves_max_all: dict[str, int],
        random: np.random.RandomState,
        **kwargs: Any,
    ) -> tuple[Arrays, Arrays, Floats]:
        """Propose one change for every walker; see Eryn's ``ReversibleJumpMove``.

        The log ratio of proposals is -inf where there is no component to update.
        """
        coords = all_coords[self.branch].copy()
        inds = all_inds[self.branch].copy()
        shape, counts = inds.shape[:2], inds.sum(-1)
        low, high = nleaves_min_all[self.branch], nleaves_max_all[self.branch]
        change = random.choice([-1, 1], size=shape)
        change = np.where(counts == low, 1, np.where(counts == high, -1, change))
        change[(random.random_sample(shape) < self.update_share) | (low == high)] = 0
        candidates = np.where((change == 1)[..., None], ~inds, inds)
        leaf = (random.random_sample(inds.shape) * candidates).argmax(-1)
        possible = candidates.any(-1)
        factors = np.where(possible, 0.0, -np.inf)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        which = self._proposal_of[counts + (change == 1)]
        for number, proposal in enumerate(self._proposals):
            chosen = possible & (which == number)
            t, w = np.nonzero(chosen & (change <= 0))
            if len(t):
                old = torch.from_numpy(coords[t, w, leaf[t, w]])
                factors[t, w] += _log_density(proposal, old)
            t, w = np.nonzero(chosen & (change >= 0))
            if len(t):
                new = proposal.sample_component(len(t), generator)
                factors[t, w] -= _log_density(proposal, new)
                coords[t, w, leaf[t, w]] = new.double().numpy()
        t, w = np.nonzero(change)
        inds[t, w, leaf[t, w]] = change[t, w] == 1
        new_coords = all_coords | {self.branch: coords}
        return new_coords, all_inds | {self.branch: inds}, factors


class ComponentStretchMove(MHMove):
    r"""Stretch one component, or the shared parameters, towards another walker's.

    .. math::
        \theta' = c + z\,(\theta - c), \qquad g(z) \propto z^{-1/2}
        \text{ on } [1/a, a], \qquad \text{factor } z^{D - 1}

    c is the component of the same rank in a walker of the same K and temperature, in
    the half of the ensemble that stands still; for shared parameters, any walker's. A
    stretch that changes the ranks, or turns a periodic parameter by more than half a
    period, could not be undone and is rejected. Walkers without a partner stay.

    Args:
        order_by: Index of the component parameter that defines the ranks.
        a: Largest stretch.
        branch: The branch of components that it moves, beside shared parameters.
        kwargs: Options of Eryn's ``Move``.
    """

    def __init__(
        self,
        order_by: int = 0,
        a: float = 2.0,
        branch: str = COMPONENTS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.order_by, self.a, self.branch = order_by, a, branch
        self._half, self._order = 0, np.arange(0)
        self._moved = np.zeros((0, 0), dtype=bool)

    def gibbs_sampling_setup_iterator(self, all_branch_names: list[str]):
        """Run the move once for each half of the walkers."""
        for self._half in (0, 1):
            yield all_branch_names, [None] * len(all_branch_names)

    def fix_logp_gibbs(
        self, branch_names_run: Any, inds_run: Any, logp: Floats, inds: Arrays
    ) -> None:
        """Mark the walkers that stay, so that no likelihood is computed for them."""
        logp[~self._moved] = -np.inf

    def get_proposal(
        self,
        branches_coords: Arrays,
        random: np.random.RandomState,
        branches_inds: Arrays | None = None,
        **kwargs: Any,
    ) -> tuple[Arrays, Floats]:
        """Propose for half of the walkers; see Eryn's ``MHMove``."""
        assert branches_inds is not None
        inds = branches_inds[self.branch]
        num_walkers, counts = inds.shape[1], inds.sum(-1)
        if self._half == 0:
            self._order = random.permutation(num_walkers)
        moving = np.isin(np.arange(num_walkers), self._order[self._half :: 2])
        num_blocks = counts + (SHARED in branches_coords)
        block = (random.random_sample(counts.shape) * num_blocks).astype(int)
        partners = (counts[..., None] == counts[:, None]) | (block == counts)[..., None]
        partners &= ~moving
        partner = (random.random_sample(partners.shape) * partners).argmax(-1)
        self._moved = moving & (num_blocks > 0) & partners.any(-1)
        z = ((self.a - 1) * random.random_sample(counts.shape) + 1) ** 2 / self.a
        ranks = self._ranks(branches_coords[self.branch], inds)
        q = {name: coords.copy() for name, coords in branches_coords.items()}
        factors = np.full(counts.shape, -np.inf)
        for name, coords in q.items():
            if name not in (self.branch, SHARED):
                continue
            t, w = np.nonzero(self._moved & ((block == counts) == (name == SHARED)))
            v, z_here = partner[t, w], z[t, w]
            leaf, other = np.zeros_like(w), np.zeros_like(w)
            if name == self.branch:
                leaf, other = ranks[t, w, block[t, w]], ranks[t, v, block[t, w]]
            fixed = branches_coords[name][t, v, other]
            new, valid = self._stretch(name, coords[t, w, leaf], fixed, z_here)
            coords[t, w, leaf] = new
            dims = coords.shape[-1]
            factors[t, w] = np.where(valid, (dims - 1) * np.log(z_here), -np.inf)
        kept = (self._ranks(q[self.branch], inds) == ranks).all(-1)
        return q, np.where(kept, factors, -np.inf)

    def _ranks(self, coords: Floats, inds: NDArray[Any]) -> NDArray[Any]:
        """Leaf of each rank, ``(temperatures, walkers, leaves)``; used ones first."""
        key = np.where(inds, coords[..., self.order_by], np.inf)
        return key.argsort(-1, kind="stable")

    def _stretch(
        self, name: str, point: Floats, fixed: Floats, z: Floats
    ) -> tuple[Floats, NDArray[Any]]:
        """Stretch points ``(n, D)``; tell which stretches can be undone."""
        away, valid = z[:, None] * (point - fixed), np.ones(len(z), dtype=bool)
        if self.periodic is None:
            return fixed + away, valid
        index, period = self.periodic.inds_periodic[name], self.periodic.periods[name]
        if not len(index):
            return fixed + away, valid
        turn = (point - fixed)[:, index]
        turn = z[:, None] * (turn - period * np.round(turn / period))
        away[:, index] = turn
        new = fixed + away
        new[:, index] %= period
        return new, (np.abs(turn) < 0.5 * period).all(-1)


def _log_density(proposal: ComponentProposal, components: Tensor) -> Floats:
    return proposal.log_prob_component(components).detach().double().numpy()

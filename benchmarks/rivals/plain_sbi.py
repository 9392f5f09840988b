"""What sbi offers without this package: MNPE, or an NPE for each K."""

import warnings
from typing import ClassVar

import torch
from sbi.inference import MNPE
from sbi.neural_nets.estimators.base import ConditionalDensityEstimator
from sbi.neural_nets.net_builders.flow import build_zuko_nsf
from sbi.neural_nets.net_builders.mixed_nets import build_mnpe
from torch import Tensor, nn

from sbi_slotflow.seeding import forked_rng, generator_for

from .base import Answer, Embedding, Rival, Training, train
from .coordinates import Coordinates

__all__ = ["Classifier", "MixedNPE", "OneForEachK"]

_FLOW = {"hidden_features": 64, "num_transforms": 3, "num_bins": 8}


class MixedNPE(Rival):
    """sbi's MNPE: q(K | x), then a flow over all Kmax components given K.

    Components are sorted, and padding is filled with draws from the prior, of which
    nothing can be learnt (a pseudo-prior), so that the flow stays a density.
    """

    trains: ClassVar[bool] = True

    def _learn(self, training: Training) -> None:
        self.coordinates = Coordinates(self.problem)
        vectors, k, _ = self.coordinates.vectors(training.theta)
        active = self.coordinates.active(k)
        filled = torch.where(active, vectors, torch.randn_like(vectors))
        targets = torch.cat([filled, k.unsqueeze(-1).float()], -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says how it tells columns apart
            estimator = build_mnpe(
                targets,
                training.x,
                z_score_x="none",
                z_score_y="none",
                embedding_net=Embedding(self.problem, training.x),
                num_categories_per_variable=torch.tensor(
                    [self.problem.layout.max_cardinality + 1]
                ),
                flow_model="zuko_nsf",
                **_FLOW,  # pyright: ignore[reportArgumentType]
            )
        self.estimator = train(
            estimator, targets, training.x, training.epochs, trainer=MNPE
        )

    @torch.no_grad()
    def probs(self, x: Tensor) -> Tensor:
        """p(K | x)."""
        sizes = torch.arange(self.problem.layout.max_cardinality + 1)
        values = [
            self.estimator.discrete_net.log_prob(
                k.float().expand(1, len(x), 1), condition=x
            )[0]
            for k in sizes
        ]
        return torch.stack(values, -1).softmax(-1).double()

    @torch.no_grad()
    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Draw K, then all components, and drop those beyond K."""
        probs = self.probs(x.unsqueeze(0))[0]
        # As the estimator's own sample does it, but with x embedded once.
        embedded = self.estimator.condition_embedding(x.unsqueeze(0))
        with forked_rng(generator_for(seed)):
            k = torch.multinomial(probs, num, replacement=True)
            condition = torch.cat(
                [k.unsqueeze(-1).float(), embedded.expand(num, -1)], -1
            )
            vectors = self.estimator.continuous_net.sample(torch.Size(()), condition)
        return Answer(probs, self.coordinates.rows(vectors.reshape(num, -1), k))

    @property
    def network(self) -> nn.Module:
        """The mixed estimator."""
        return self.estimator


class OneForEachK(Rival):
    """A classifier of K, and an NPE for each K, trained on the signals that have it."""

    trains: ClassVar[bool] = True

    def _learn(self, training: Training) -> None:
        self.coordinates = Coordinates(self.problem)
        vectors, k, _ = self.coordinates.vectors(training.theta)
        embedding = Embedding(self.problem, training.x)
        num = self.problem.layout.max_cardinality + 1
        classifier = Classifier(embedding, num, self.problem.num_data)
        targets = k.unsqueeze(-1).float()
        self.networks = nn.ModuleDict()
        self.networks["K"] = train(classifier, targets, training.x, training.epochs)
        for size in k.unique().tolist():
            chosen = k == size
            length = self._length(size)
            x = training.x[chosen]
            flow = build_zuko_nsf(
                vectors[chosen, :length],
                x,
                z_score_x="none",
                z_score_y="none",
                embedding_net=Embedding(self.problem, training.x),
                **_FLOW,
            )
            self.networks[str(size)] = train(
                flow, vectors[chosen, :length], x, training.epochs
            )

    def _length(self, k: int) -> int:
        return self.coordinates.num_shared + k * self.coordinates.width

    @torch.no_grad()
    def probs(self, x: Tensor) -> Tensor:
        """p(K | x)."""
        classifier = self.networks["K"]
        assert isinstance(classifier, Classifier)
        return classifier.logits(x).softmax(-1).double()

    @torch.no_grad()
    def infer(
        self, x: Tensor, num: int, seed: int, truth: Tensor | None = None
    ) -> Answer:
        """Draw K from the classifier, then components from its flow."""
        probs = self.probs(x.unsqueeze(0))[0]
        with forked_rng(generator_for(seed)):
            k = torch.multinomial(probs, num, replacement=True)
            vectors = torch.zeros(num, self.coordinates.size)
            for size in k.unique().tolist():
                chosen = (k == size).nonzero().squeeze(-1)
                flow = self._flow(size)
                drawn = flow.sample(torch.Size((len(chosen),)), x.unsqueeze(0))[:, 0]
                vectors[chosen, : self._length(size)] = drawn
        return Answer(probs, self.coordinates.rows(vectors, k))

    @torch.no_grad()
    def log_prob_given_k(self, theta: Tensor, x: Tensor) -> Tensor:
        """Log densities given K."""
        k = self.problem.layout.cardinality(theta)
        values = torch.zeros(len(theta), dtype=torch.float64)
        for size in k.unique().tolist():
            flow, length = self._flow(size), self._length(size)
            chosen = k == size

            def density(v: Tensor, k: Tensor) -> Tensor:
                return flow.log_prob(v[:, :length].unsqueeze(0), x[chosen])[0]  # noqa: B023

            values[chosen] = self.coordinates.sum_over_labellings(
                theta[chosen], density
            )
        return values

    def _flow(self, k: int) -> ConditionalDensityEstimator:
        flow = self.networks[str(k)]
        assert isinstance(flow, ConditionalDensityEstimator)
        return flow

    @property
    def network(self) -> nn.Module:
        """Classifier and flows."""
        return self.networks


class Classifier(ConditionalDensityEstimator):
    """q(K | x), for sbi's trainer.

    Args:
        embedding: Embedding of x.
        num: Number of cardinalities.
        num_data: Length T of x.
    """

    def __init__(self, embedding: Embedding, num: int, num_data: int) -> None:
        net = nn.Sequential(
            embedding,
            nn.Linear(embedding.num_features, 64),
            nn.GELU(),
            nn.Linear(64, num),
        )
        super().__init__(net, torch.Size((1,)), torch.Size((num_data,)))

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``(B, num)``."""
        return self.net(x)

    def loss(self, input: Tensor, condition: Tensor, **kwargs: object) -> Tensor:
        """Cross-entropy ``(B,)``."""
        return nn.functional.cross_entropy(
            self.logits(condition), input[:, 0].long(), reduction="none"
        )

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs: object) -> Tensor:
        """Log probabilities ``(1, B)``."""
        return -self.loss(input.reshape(-1, 1), condition).unsqueeze(0)

    def sample(
        self, sample_shape: torch.Size, condition: Tensor, **kwargs: object
    ) -> Tensor:
        """Draw K ``(*sample_shape, B, 1)``."""
        logits = self.logits(condition)
        drawn = torch.distributions.Categorical(logits=logits).sample(sample_shape)
        return drawn.unsqueeze(-1).float()

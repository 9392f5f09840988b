"""Anchored slots on pulses in a trace: ``python -m benchmarks.anchored_spikes``.

``calibration`` trains a small network on ``problems.spikes()``, in two stages as the
shipped weights are made, and measures on fresh traces how calibrated p(K | x) and the
credible intervals are. Training and coverage keep their state in ``checkpoints/`` and
may be stopped and taken up again.
"""

from pathlib import Path

from sbi_slotflow import SlotPosterior
from sbi_slotflow.problems import spikes
from sbi_slotflow.training.stages import Stage, train_stages

from .calibration_rows import cardinality_rows, coverage_rows
from .common import Numbers, run_parts

_CHECKPOINTS = Path("checkpoints")
_STAGES = (
    Stage(64_000, 1e-3, 3.0, part="anchors"),
    Stage(24_000, 1e-3, 3.0, part="local"),
)


def calibration(num_components: int, seed: int) -> Numbers:
    """p(K | x) and credible intervals of time, width and amplitude by K, ``spikes``."""
    problem, posterior = spikes(), _trained()
    simulations = [stage.num_simulations for stage in _STAGES]
    return {
        "simulations of the two stages": simulations,
        "K": cardinality_rows(problem, posterior, 10 * num_components, seed),
        "credible intervals given K": coverage_rows(
            problem,
            posterior,
            num_components,
            seed,
            _CHECKPOINTS / "coverage-spikes",
        ),
    }


def _trained() -> SlotPosterior:
    """The posterior of the last stage, trained as far as it is not yet."""
    problem = spikes()
    estimator = train_stages(
        problem, {"refine_slots": 3}, _STAGES, _CHECKPOINTS / "spikes"
    )
    return SlotPosterior(estimator.eval(), problem.prior)


PARTS = {"calibration": (calibration, 1_000)}

if __name__ == "__main__":
    run_parts(PARTS, "spikes", __doc__)

"""Small trained posteriors that several test files share."""

from functools import cache

from sbi_slotflow import SlotNPE, SlotPosterior, problems, slot_nn


class SilentTracker:
    """sbi tracker that keeps nothing, so that no log folder is made."""

    log_dir = None

    def log_metric(self, name, value, step=None):
        pass

    def log_metrics(self, metrics, step=None):
        pass

    def log_params(self, params):
        pass

    def add_figure(self, name, figure, step=None):
        pass

    def flush(self):
        pass


@cache
def linear_gaussian_posterior(num_simulations: int = 80_000) -> SlotPosterior:
    """Posterior of ``problems.linear_gaussian()``, trained in under a minute."""
    problem = problems.linear_gaussian()
    trainer = SlotNPE(
        problem.prior,
        slot_nn(problem),
        tracker=SilentTracker(),
        show_progress_bars=False,
    )
    trainer.train_online(problem.simulator, num_simulations=num_simulations)
    return trainer.build_posterior()

"""One module an experiment; see :mod:`benchmarks.experiment`."""

"""Print what the timing tables leave out: parameters, signals per second."""

import pytest


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """List every benchmark's extra information."""
    session = getattr(config, "_benchmarksession", None)
    for result in getattr(session, "benchmarks", []):
        for name, value in result.extra_info.items():
            terminalreporter.write_line(f"{result.name}: {name} = {value:,}")

"""Benchmarks run when they are asked for: ``pytest tests/benchmarks``, or ``--benchmark-only`` with anything."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path, config):
    asked_for = (Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args)
    if config.getoption("benchmark_only") or any(path.is_relative_to(HERE) for path in asked_for):
        return None
    return True

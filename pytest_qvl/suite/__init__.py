"""The shipped tests: ``pytest --pyargs pytest_qvl.suite``. A fixture in, a check called, no logic."""

SUITE_VERSION = 1

"""``pytest-qvl data``: a data set's rows through a collator, and what :func:`pytest_qvl.checks.batch` says of them."""

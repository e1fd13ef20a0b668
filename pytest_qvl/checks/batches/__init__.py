"""What :func:`pytest_qvl.checks.batch` is made of: each module judges one side of a batch that a collator made."""

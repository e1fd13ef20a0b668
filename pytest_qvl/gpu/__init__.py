"""Which GPU this process may use, and what the driver says about it."""

# Seconds to wait for a GPU that others hold: a CI job that waits longer is better started again than kept.
PATIENCE_S = 1800.0

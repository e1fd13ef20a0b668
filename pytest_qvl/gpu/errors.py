"""Why no GPU can be leased."""

from __future__ import annotations


class LeaseError(RuntimeError):
    """No GPU can be leased, for a reason that waiting does not fix."""


class NoGpu(LeaseError):
    """The caller allows no GPU, or the machine has none; the message says which."""


class LeaseTimeout(LeaseError):
    """Others held every allowed GPU for longer than the patience; the message names them."""

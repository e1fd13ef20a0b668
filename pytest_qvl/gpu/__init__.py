"""Which GPU this process may use, and what the driver says about it."""

"""More than one backend: each runs its tests in a process of its own."""

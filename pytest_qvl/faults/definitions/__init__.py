"""The faults themselves, by the part of a setup that they damage; they know no matrix."""

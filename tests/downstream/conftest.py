"""The project is run in a copy of its own, with its own rootdir: not as a part of this repository."""

collect_ignore = ["project"]

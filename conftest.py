"""The plugin comes in by its entry point; nothing to do here but let tests drive pytest itself."""

import os

# Before torch is imported: workers that each start a thread per core spend their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]

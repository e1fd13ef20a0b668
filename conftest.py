"""The plugin comes in by its entry point; nothing to do here but let tests drive pytest itself."""

import gc
import os

# Before torch is imported: workers that each start a thread per core spend their time waiting for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester"]


def pytest_collection_finish():
    """Each run that a test starts ends with five garbage collections, which would look at all of torch each time."""
    gc.collect()
    gc.freeze()

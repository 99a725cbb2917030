"""For all tests."""

import importlib.util
import os

# Before torch is imported: tests run on several workers, and in several processes each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine with a GPU that is there for `pytest -m gpu` alone need not have it.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # How long an example takes says nothing on a busy machine. CI tries the same examples each time; new ones are
    # looked for while working.
    settings.register_profile("working", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "working")

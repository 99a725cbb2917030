"""For all tests."""

import os

# Before torch is imported: tests run on several workers, and in several processes each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

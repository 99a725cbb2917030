"""The short version of `benchmarks/kills.py`: SIGKILL, and a run that comes out as if nothing had happened."""

import subprocess
import sys

import pytest

from tests.toy import ROOT


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_three_times_a_run_ends_with_the_losses_of_an_undisturbed_one() -> None:
    command = [sys.executable, "benchmarks/kills.py", "--kills", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "no checkpoint lost or damaged, every loss equal" in done.stdout

"""What signals do to a run that has begun."""

import signal
import subprocess
import sys
import time

import pytest

from hybrid.training.interrupt import SAME_SECONDS, Interrupt


def test_a_signal_is_noted_and_says_how_the_run_ends() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        with Interrupt(alone=True, says=False) as interrupt:
            assert not interrupt.wanted
            signal.raise_signal(number)
            assert interrupt.wanted
        assert interrupt.exit().code == 128 + number


def test_what_a_launcher_passes_on_is_the_same_ctrl_c() -> None:
    with Interrupt(alone=True, says=False) as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert interrupt.exit().code == 130


@pytest.mark.parametrize(("alone", "code"), [(True, 130), (False, -signal.SIGINT)])
def test_a_second_ctrl_c_ends_the_run_at_once(alone: bool, code: int) -> None:
    script = f"""import time; from hybrid.training.interrupt import Interrupt
with Interrupt(alone={alone}, says=True):
    print(1, flush=True)
    while True: time.sleep(0.01)"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    process.send_signal(signal.SIGINT)
    time.sleep(SAME_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None and b"SIGINT: saves after this step and stops" in process.stderr.read()
    assert process.wait(10) == code


def test_a_signal_is_noted_though_nobody_reads_what_is_said_of_it() -> None:
    """As behind a pipe whose reader has gone."""
    script = """import os, signal; from hybrid.training.interrupt import Interrupt
reading, writing = os.pipe(); os.close(reading); os.dup2(writing, 2)
with Interrupt(alone=True, says=True) as interrupt:
    signal.raise_signal(signal.SIGTERM)
print(interrupt.wanted)"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert done.stdout == b"True\n"

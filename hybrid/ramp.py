"""The batch size that grows at the start of a run, as Megatron's `--rampup-batch-size START INCREMENT SAMPLES` had it.

The batch depends on the samples that have been read alone, so that a run goes on with the same batches from wherever it
was stopped.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """From `start` samples a step in equal rises of `increment` to `full`, which is reached after `samples` samples."""

    start: int
    increment: int
    samples: int
    full: int

    def batch(self, consumed: int) -> int:
        """Samples of the step that begins after `consumed` samples."""
        if consumed >= self.samples:
            return self.full
        # Megatron divides twice in floating point; so does this, to rise at the same sample.
        rises = (self.full - self.start) // self.increment
        return self.start + int(consumed / (self.samples / rises)) * self.increment if rises else self.full

    def steps(self, samples: int) -> int:
        """Whole steps that `samples` samples are enough for."""
        steps = consumed = 0
        while consumed < self.samples and consumed + self.batch(consumed) <= samples:
            consumed += self.batch(consumed)
            steps += 1
        return steps + max(0, samples - consumed) // self.full if consumed >= self.samples else steps

    def consumed(self, steps: int) -> int:
        """Samples of the first `steps` steps."""
        consumed = 0
        while steps and consumed < self.samples:
            consumed += self.batch(consumed)
            steps -= 1
        return consumed + steps * self.full

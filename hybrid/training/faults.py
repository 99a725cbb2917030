"""Steps that must not be kept: a loss or gradient that is not a number, a spike. What to do is the recipe's."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from hybrid.config import FaultsConfig, OnFault
from hybrid.errors import UserError

# Gradient norms that make the usual one, and how many of them it takes to speak of a usual one.
_WINDOW, _ENOUGH = 100, 20
# Steps over which bad ones are counted.
_COUNTED = 1000


class BadStep(Exception):
    """A step whose update is left out; `policy` says what is to come."""

    def __init__(self, what: str, policy: OnFault):
        super().__init__(what)
        self.what, self.policy = what, policy


class Judge:
    """Tells bad steps from good ones. All ranks see the same numbers, so they come to the same judgement."""

    def __init__(self, faults: FaultsConfig):
        self._faults = faults
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._bad: deque[int] = deque()

    @property
    def norms(self) -> list[float]:
        """Recent gradient norms, to be kept in a checkpoint: a resumed run must judge as one that was not stopped."""
        return list(self._norms)

    def remember(self, norms: Iterable[float]) -> None:
        """Take up the norms of a checkpoint."""
        self._norms = deque(norms, maxlen=_WINDOW)

    def loss(self, loss: float) -> None:
        """Raise BadStep for a loss that is no number."""
        if not math.isfinite(loss):
            raise BadStep(f"the loss is {loss}", self._faults.on_nan)

    def norm(self, norm: float) -> None:
        """Raise BadStep for a gradient norm that is no number, or far above the usual."""
        if not math.isfinite(norm):
            raise BadStep(f"the gradient norm is {norm}", self._faults.on_nan)
        if self._faults.spike_factor and len(self._norms) >= _ENOUGH:
            usual = statistics.median(self._norms)
            if norm > self._faults.spike_factor * usual:
                raise BadStep(f"the gradient norm is {norm:.3g}, usual is {usual:.3g}", self._faults.on_spike)
        self._norms.append(norm)

    def count(self, step: int, bad: BadStep) -> None:
        """Note a bad step. Raises UserError if the policy is to stop, or there were too many of late."""
        self._bad.append(step)
        while self._bad[0] <= step - _COUNTED:
            self._bad.popleft()
        way_out = "then run the same command to go on from the last checkpoint"
        if bad.policy == "stop":
            raise UserError(
                f"step {step}: {bad.what}; nothing of this step is kept. Lower optimizer.lr, look at the data, or set "
                f"faults.on_nan or faults.on_spike to skip or rollback, {way_out}"
            )
        if len(self._bad) > self._faults.limit:
            raise UserError(
                f"step {step}: {bad.what}, and {len(self._bad) - 1} of the {_COUNTED:,} steps before were bad, too "
                f"(faults.limit is {self._faults.limit}). Lower optimizer.lr or look at the data, {way_out}"
            )


def update(optimizer: Any, judge: Callable[[float], None]) -> float:
    """Megatron's optimizer step; returns the gradient norm before clipping.

    `judge` gets the norm before anything is changed, and whatever it raises ends the step there.
    """
    measure = optimizer.get_grad_norm

    def judged() -> float:
        norm = float(measure())
        judge(norm)
        return norm

    optimizer.get_grad_norm = judged
    try:
        _, norm, _ = optimizer.step()
    finally:
        del optimizer.get_grad_norm
    return float(norm)

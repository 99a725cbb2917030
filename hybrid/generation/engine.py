"""Continuous batching: sequences come and go while the others go on.

A thread of its own goes round: take in what waits, read one piece of one prompt, decode one position of all sequences
that have been read. So a long prompt holds the others up by one piece at a time, and several prompts take turns.

Where the device computes by itself (CUDA), it is a step ahead: as long as no sequence comes or goes, the next step is
launched with tokens that only the device knows, and the host hands those of the step before over meanwhile. A sequence
that turns out to have ended has then been computed one position too far, which nobody sees.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hybrid.errors import ConfigError, Problem, UserError
from hybrid.generation.runner import Runner
from hybrid.generation.sampling import NONE, Chosen, Row, Sampling, choose, logprobs, new_key, pick

_LOG = logging.getLogger(__name__)
Reason = Literal["stop", "length", "cancelled", "error"]


class QueueFull(UserError):
    """As many requests wait as may."""


class Closed(UserError):
    """The engine takes no more requests."""


@dataclass(eq=False)
class Job:
    """One sequence, and whom to tell of it; all of `on_...` are called on the engine's thread.

    `on_token` says whether the sequence ends with this token; `on_prompt` gets what the prompt's tokens after the first
    had as log-probabilities, if that was asked for; `on_stop` gets the token that ends it, if one does; `on_end` is
    called once, with the reason. One that raises ends this sequence with an error, and no other.
    """

    prompt: list[int]
    sampling: Sampling
    on_token: Callable[[Chosen], bool]
    on_end: Callable[[Reason], None]
    on_prompt: Callable[[list[Chosen]], None] | None = None
    on_stop: Callable[[Chosen], None] | None = None
    number: int = 0  # which of several texts for one prompt
    cancelled: bool = False
    row: Row = field(init=False)
    slot: int = -1  # of the state, while its prompt is read
    read: int = 0  # positions of the prompt
    last: int = 0  # the token that is to be read next
    ended: Reason | None = None  # why, once its last token is there; it may still hold a slot
    before: Tensor | None = None  # logits (vocabulary) of the last position that was read, if the prompt is scored
    submitted: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        seen = set(self.prompt) if self.sampling.repetition_penalty != 1 else set()
        self.row = Row(self.sampling, new_key(self.sampling.seed, self.number), seen=seen)

    @property
    def scored(self) -> bool:
        """Whether the prompt's own log-probabilities are asked for."""
        return self.sampling.echo and self.sampling.logprobs is not None


@dataclass(frozen=True)
class _Launched:
    """A step whose tokens the host has not looked at: those of `jobs`, on the device and on their way to the host.

    On the device, where they are read next, there is a token in the place of `NONE`, too.
    """

    jobs: list[Job]
    tokens: Tensor
    copied: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> list[int]:
        if self.done is not None:
            self.done.synchronize()
        return self.copied.tolist()


class Engine:
    """Runs jobs on a runner in a thread of its own; `submit` and `cancel` may be called from any thread."""

    def __init__(self, runner: Runner, end: int, max_waiting: int = 256, threads: int = 0):
        """`end` is the token that ends a document; `threads` of the CPU compute, 0: as many as torch takes."""
        self.runner, self.end, self.max_waiting = runner, end, max_waiting
        self.failure: BaseException | None = None
        self.steps = 0
        self.ahead = runner.asynchronous
        self._threads = threads
        self._launched: _Launched | None = None
        self._unfinished: set[Job] = set()  # wherever they are
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._decoding: list[Job] = []
        self._free = list(runner.reading_rows)
        self._changed = threading.Condition()
        self._closing = False
        self._cancelled = False  # some job has been, since they were last looked for
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def closing(self) -> bool:
        """Whether no more jobs are taken."""
        return self._closing

    @property
    def waiting(self) -> int:
        """Jobs that have not been begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs that hold a slot."""
        with self._changed:  # a job whose prompt is being read at this moment is in neither of the other two
            return len(self._unfinished) - len(self._waiting)

    def check(self, prompt: list[int], sampling: Sampling) -> None:
        """Raise ConfigError for what this model cannot do."""
        most = self.runner.room.max_length
        problems = []
        if not prompt:
            problems.append(Problem("prompt", "is empty; give the text to go on from"))
        problems += self._outside("prompt", prompt) + self._outside("stop_tokens", sampling.stop_tokens)
        rest = most - len(prompt)
        if rest < min(1, sampling.max_tokens):
            said = f"has {len(prompt)} tokens, and prompt and text together may have {most}"
            problems.append(Problem("prompt", f"{said}; shorten it, or open the model with a greater max_length"))
        elif rest < sampling.max_tokens:
            said = f"is {sampling.max_tokens}, and the prompt has {len(prompt)} tokens; together they may be {most}"
            problems.append(
                Problem("max_tokens", f"{said}: ask for {rest} at most, or open the model with a greater max_length")
            )
        if problems:
            raise ConfigError(problems)

    def check_count(self, texts: int) -> None:
        """Raise ConfigError for more texts at once than there will ever be room for."""
        slots = self.runner.room.slots
        if texts > slots + self.max_waiting:
            most = f"there is room for {slots} and for {self.max_waiting} that wait; ask for fewer"
            raise ConfigError(Problem("", f"{texts} texts are asked for at once, and {most}"))

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise ConfigError for tokens that are not in the vocabulary."""
        if problems := self._outside("tokens", tokens):
            raise ConfigError(problems)

    def _outside(self, place: str, tokens: Sequence[int]) -> list[Problem]:
        vocabulary = self.runner.weights.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
        said = f"has token {wrong}; the vocabulary has those from 0 to {vocabulary - 1}"
        return [] if wrong is None else [Problem(place, said)]

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all of them or none. Raises ConfigError, QueueFull or Closed."""
        for job in jobs:
            self.check(job.prompt, job.sampling)
        self.check_count(len(jobs))
        with self._changed:
            if self._closing or self.failure:
                raise Closed("the model is not taking requests any more")
            # What a free slot takes at once does not wait.
            free = max(0, self.runner.room.slots - self.running)
            if len(self._waiting) + len(jobs) > self.max_waiting + free:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.extend(jobs)
            self._unfinished.update(jobs)
            self._changed.notify()

    def cancel(self, *jobs: Job) -> None:
        """End jobs, as soon as the step that is being computed is done. Those that have ended stay as they are."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._cancelled = True
            self._changed.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Take no more jobs, finish those there are within `timeout` seconds (None: for ever), cancel the others.

        Returns whether all were finished.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        finished = not self._thread.is_alive()
        if not finished:
            with self._changed:
                jobs = list(self._unfinished)
            self.cancel(*jobs)
            self._thread.join()
        return finished

    def _run(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)  # of this thread
        try:
            while self._wait():
                if self._launched is None or not self._goes_on():
                    self._settle()
                    self._drop_cancelled()
                    self._admit()
                    if self._reading:
                        self._read()
                if self._decoding:
                    self._decode()
            self.runner.stop()
        except BaseException as error:  # whatever it is, those who wait must hear of it
            _LOG.error("the model failed while it was computing", exc_info=error)
            with self._changed:
                self.failure = error
            for job in list(self._unfinished):
                self._finish(job, "error")
            self._decoding, self._reading, self._launched = [], deque(), None
            self._waiting.clear()
            self.runner.fail()

    def _wait(self) -> bool:
        """Wait until there is something to do; False if that will not come."""
        with self._changed:
            while not (self._waiting or self._reading or self._decoding):
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _drop_cancelled(self) -> None:
        with self._changed:
            self._cancelled = False
            gone = [job for job in self._waiting if job.cancelled]
            for job in gone:
                self._waiting.remove(job)
        for job in gone:
            self._finish(job, "cancelled")
        for job in [job for job in self._reading if job.cancelled]:
            self._reading.remove(job)
            self._end_reading(job, "cancelled")
        for slot in range(len(self._decoding) - 1, -1, -1):
            if self._decoding[slot].cancelled:
                self._leave(slot, "cancelled")

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and self._free and self.running < self.runner.room.slots:
                job = self._waiting.popleft()
                job.slot = self._free.pop()
                self._reading.append(job)
                self.runner.reset(job.slot)

    def _read(self) -> None:
        """One piece of the prompt whose turn it is; on CUDA of others, too."""
        first = self._reading[0]
        jobs = [first, *(job for job in list(self._reading)[1:] if self._goes_with(job, first))]
        count = min(len(jobs), self.runner.prefill_together)
        jobs = jobs[: 1 << count.bit_length() - 1]
        for job in jobs:
            self._reading.remove(job)
        logits = self.runner.read([job.slot for job in jobs], [self._piece(job) for job in jobs], first.scored)
        finished = []
        for i, job in enumerate(jobs):
            if job.scored:
                job.ended = self._score(job, self._piece(job), logits[i])
            job.read += len(self._piece(job))
            if job.ended is not None:
                self._end_reading(job, job.ended)
            elif job.read < len(job.prompt):
                self._reading.append(job)
            else:
                finished.append((job, i))
        if finished:
            self._begin_all([job for job, _ in finished], logits[[i for _, i in finished], -1])

    def _goes_with(self, job: Job, first: Job) -> bool:
        """Whether pieces of two prompts can be read at once."""
        if self.runner.pads:
            return not job.scored and not first.scored
        alike = (job.read, len(self._piece(job)), job.scored) == (first.read, len(self._piece(first)), first.scored)
        return alike and self.runner.prefill_together > 1

    def _piece(self, job: Job) -> list[int]:
        return job.prompt[job.read : job.read + self.runner.room.prefill_chunk]

    def _score(self, job: Job, piece: list[int], logits: Tensor) -> Reason | None:
        """Hand over the log-probabilities of a piece of a prompt; returns why it ends with that, if it does.

        Logits (positions, vocabulary); each position is about the next.
        """
        about, tokens = logits[:-1], piece[1:]
        if job.before is not None:
            about, tokens = torch.cat([job.before.unsqueeze(0), about]), piece
        job.before = logits[-1].clone()
        if job.on_prompt is not None and tokens:
            scores = logprobs(about, tokens, [job.sampling.logprobs or 0] * len(tokens))
            try:
                job.on_prompt(scores)
            except Exception:
                return _given_up("it could not be told of its prompt")
        return None

    def _begin_all(self, jobs: list[Job], logits: Tensor) -> None:
        """Begin what has been read: logits (jobs, vocabulary). What they are no numbers for ends with an error."""
        right = logits.isfinite().all(-1).tolist()
        begun = []
        for i, job in enumerate(jobs):
            if not right[i]:
                self._end_reading(job, _no_numbers(job))
            elif job.sampling.max_tokens == 0:
                self._end_reading(job, "length")
            else:
                begun.append(i)
        if begun:
            for i, token in zip(begun, choose(logits[begun], [jobs[i].row for i in begun]), strict=True):
                self._begin(jobs[i], token)

    def _begin(self, job: Job, first: Chosen) -> None:
        """Decode a sequence from here on, unless its first token is the last one."""
        reason = self._take(job, first)
        if reason is not None:
            self._end_reading(job, reason)
            return
        self.runner.copy(job.slot, len(self._decoding))
        self._decoding.append(job)
        self._free.append(job.slot)

    def _end_reading(self, job: Job, reason: Reason) -> None:
        self._free.append(job.slot)
        self._finish(job, reason)

    def _finish(self, job: Job, reason: Reason) -> None:
        with self._changed:
            self._unfinished.discard(job)
        try:
            job.on_end(reason)
        except Exception:
            _LOG.exception("who asked for a text could not be told that it has ended")

    def _decode(self) -> None:
        jobs = self._decoding
        rows = [job.row for job in jobs]
        before, self._launched = self._launched, None
        logits = self.runner.step([job.last for job in jobs] if before is None else before.tokens)
        self.steps += 1
        if self.ahead and all(row.blind for row in rows):
            self._launched = self._launch(logits, 0 if before is None else 1)
            if before is not None and self._hand_over(before):
                self._settle()
            return
        for job, token in zip(list(jobs), choose(logits, rows), strict=True):
            job.ended = self._take(job, token)
        self._leave_ended()

    def _launch(self, logits: Tensor, ahead: int) -> _Launched:
        tokens = pick(logits, [job.row for job in self._decoding], ahead)
        read = tokens.clamp(min=0)
        if not tokens.is_cuda:
            return _Launched(list(self._decoding), read, tokens, None)
        copied, done = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True), torch.cuda.Event()
        copied.copy_(tokens, non_blocking=True)
        done.record()
        return _Launched(list(self._decoding), read, copied, done)

    def _goes_on(self) -> bool:
        """Whether the next step is of the same sequences, whatever the tokens are that were just launched."""
        comes = bool(self._reading) or (self._waiting and self._free and self.running < self.runner.room.slots)
        return not (comes or self._cancelled) and all(
            job.row.blind and job.row.position + 1 < job.sampling.max_tokens for job in self._decoding
        )

    def _settle(self) -> None:
        """Hand over the tokens of the launched step; then there is none."""
        launched, self._launched = self._launched, None
        if launched is not None:
            self._hand_over(launched)
        self._leave_ended()

    def _hand_over(self, launched: _Launched) -> bool:
        """Give each job its token, unless it ended with the one before; returns whether one has ended."""
        for job, token in zip(launched.jobs, launched.wait(), strict=True):
            if job.ended is None:
                job.row.take(token)
                job.ended = self._take(job, Chosen(token))
        return any(job.ended for job in launched.jobs)

    def _leave_ended(self) -> None:
        for slot in range(len(self._decoding) - 1, -1, -1):
            reason = self._decoding[slot].ended
            if reason is not None:
                self._leave(slot, reason)

    def _take(self, job: Job, chosen: Chosen) -> Reason | None:
        """Hand a token over; returns why the sequence ends with it, if it does."""
        if chosen.token == NONE:
            return _no_numbers(job)
        job.last = chosen.token
        sampling = job.sampling
        try:
            if chosen.token in sampling.stop_tokens or (chosen.token == self.end and not sampling.ignore_end):
                if job.on_stop is not None:
                    job.on_stop(chosen)
                return "stop"
            if job.on_token(chosen):
                return "stop"
        except Exception:
            return _given_up("it could not be told of a token")
        return "length" if job.row.position >= sampling.max_tokens else None

    def _leave(self, slot: int, reason: Reason) -> None:
        """End a sequence; the last one takes its slot."""
        job, last = self._decoding[slot], len(self._decoding) - 1
        if slot != last:
            self.runner.copy(last, slot)
            self._decoding[slot] = self._decoding[last]
        self._decoding.pop()
        self._finish(job, reason)


def _no_numbers(job: Job) -> Reason:
    _LOG.error(
        "a text was given up: after its prompt (tokens: %d) and %d of its own the model's logits are not numbers "
        "(NaN or infinite); its weights are damaged, or from a training that failed",
        len(job.prompt),
        job.row.position,
    )
    return "error"


def _given_up(why: str) -> Reason:
    """For an exception of who asked, which is no business of the others."""
    _LOG.exception("a text was given up: %s", why)
    return "error"

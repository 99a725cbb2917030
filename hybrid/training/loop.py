"""The training loop: settings in, a run's folder with metrics and checkpoints out."""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hybrid.quiet  # noqa: F401

# isort: split
import torch

from hybrid import settings_file
from hybrid.checks import require
from hybrid.config import Settings
from hybrid.costs import parameters
from hybrid.costs.hardware import GIB
from hybrid.costs.pipeline import stage_pattern
from hybrid.data.datasets import Datasets, build_datasets
from hybrid.data.tokenizer import Tokenizer, load_tokenizer
from hybrid.errors import ConfigError, Problem, UserError
from hybrid.model import kernels
from hybrid.pattern import LAYER_KINDS, Pattern
from hybrid.training import checkpoint, checksums, folder, provenance, resume, trackers
from hybrid.training.checkpoint import Position
from hybrid.training.distributed import World, start, stop, world_size
from hybrid.training.faults import BadStep, Judge
from hybrid.training.interrupt import Interrupt
from hybrid.training.metrics import Clock, OwnTime, Rates, memory_gib, over_ranks
from hybrid.training.profiling import Profiling
from hybrid.training.report import Report
from hybrid.training.saving import Saved, Saver
from hybrid.training.setup import Training, set_up
from hybrid.training.step import Batches, Stepper, micro_batch_loader
from hybrid.training.watchdog import Watchdog


def train(settings: Settings) -> None:
    """Run the training that `settings` describe, as one rank of the processes there are.

    Raises ConfigError before anything is built if the settings cannot work, UserError when the run cannot go on.
    """
    require(settings, world_size())
    kernels.require(settings)
    trackers.require(settings)
    pattern = stage_pattern(settings)
    virtual = len(pattern.segments) // settings.parallel.pipeline
    world = start(settings.parallel, virtual if virtual > 1 else None, settings.trainer.seed)
    try:
        run = Path(settings.folder) / settings.name
        if world.is_main:
            _open_folder(settings, run, world)
        world.barrier()
        _run(settings, pattern, run, world)
    finally:
        gc.collect()  # the model's other rings; with it go the process groups that it holds
        stop()


def _say_new_length(settings: Settings, latest: Path, say: Callable[[str], None]) -> None:
    """Say it where a run that goes on has another length than before, and its learning rate with it."""
    before, steps = settings_file.read(latest).trainer.steps, settings.trainer.steps
    optimizer = settings.optimizer
    if before != steps and optimizer.decay_samples is None and optimizer.schedule != "constant":
        say(f"trainer.max_steps was {before} and is {steps}: the learning rate goes on where a run of {steps} has it")


def _open_folder(settings: Settings, run: Path, world: World) -> None:
    """Make the run's folder, or take it up again if it holds the same run."""
    folder.refuse_other_run(settings)
    if before := folder.begun_with(run):  # what it started from is no longer asked
        settings = replace(settings, checkpoint=replace(settings.checkpoint, load=before.checkpoint.load))
    with folder.writable(run):
        run.mkdir(parents=True, exist_ok=True)
        settings_file.write(settings, run)
        provenance.record(run, world.size, _device_name(world.device))
        folder.remove_unfinished(run / folder.CHECKPOINTS)


def _run(settings: Settings, pattern: Pattern, run: Path, world: World) -> None:
    trainer = settings.trainer
    with Report(run, trainer.steps, speaks=world.is_main) as report:
        for line in describe(settings, pattern, world):
            report.say(line)
        latest = resume.newest_whole(run / folder.CHECKPOINTS, world, report.say)
        if done := folder.finished(settings, folder.step_of(latest) if latest else None):
            report.say(done)
            return
        source = None if latest else _source(settings)
        tokenizer = _tokenizer(settings.data.tokenizer, latest)
        datasets = build_datasets(
            settings,
            tokenizer,
            train_samples=trainer.samples,
            validation_samples=trainer.eval_steps * trainer.global_batch_size,
        )
        for note in datasets.notes:
            report.say(note)
        training = set_up(settings, pattern, world.device)
        judge = Judge(settings.faults)
        position = Position(data=datasets.fingerprint)
        if latest is not None:
            position = checkpoint.load(latest, settings, training)
            judge.remember(position.norms)
            began = settings_file.read(latest).checkpoint.load if settings.checkpoint.load else None
            report.say(f"goes on from step {position.step}{f'; it began from {began}' if began else ''}")
            _say_new_length(settings, latest, report.say)
            if position.data != datasets.fingerprint:
                report.say("warning: the data has changed since; what follows is not what this run would have read")
                position = replace(position, data=datasets.fingerprint)
        elif source is not None:
            checkpoint.load_weights(source, [checkpoint.unwrap(chunk) for chunk in training.chunks])
            training.optimizer.reload_model_params()
            report.say(f"starts from the weights in {source}")
        report.say(f"{parameters.whole(settings).total:,} parameters; run folder {run}")
        if world.is_main:
            report.sinks = trackers.connect(settings, run)
        report.begin(position.step)
        clock = Clock()
        token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(world.device)
        saver = Saver(run / folder.CHECKPOINTS, settings, tokenizer, world)
        asked = Interrupt(alone=world.size == 1, says=world.is_main)
        try:
            with Watchdog(settings.faults.hang_seconds, world.rank, run) as watchdog, asked as interrupt:
                stepper = Stepper(settings, training, token_bytes, world, clock, judge, watchdog.beat)
                _Loop(settings, world, report, datasets, training, stepper, saver, run, interrupt, position).run()
        finally:
            training.release()


@dataclass
class _Loop:
    """The steps of a run, from a position to the end."""

    settings: Settings
    world: World
    report: Report
    datasets: Datasets
    training: Training
    stepper: Stepper
    saver: Saver
    folder: Path
    interrupt: Interrupt
    position: Position

    def run(self) -> None:
        """Train to the last step, or until somebody asks to stop: then SystemExit, with the exit code that says so."""
        trainer, clock = self.settings.trainer, self.stepper.clock
        data: Batches = [
            iter(micro_batch_loader(self.settings, self.datasets.train, self.position.samples))
            for _ in self.training.chunks
        ]
        own, rates = OwnTime(self.world.device), Rates(self.settings, self.world)
        hooks: Any = self.training.config
        hooks.finalize_model_grads_func = own.before(hooks.finalize_model_grads_func)
        with Profiling(trainer, self.folder, self.world, self.position.step) as profiling:
            clock.take()
            while self.position.step < trainer.steps:
                own.mark(end=False)
                batch = trainer.ramp.batch(self.position.samples)
                values = self._step(data, batch)
                step, last = self.position.step, self.position.step == trainer.steps
                phases = clock.take()
                of_ranks = self.world.gather(
                    own.seconds(), phases["data"], memory_gib(self.world.device), float(self.interrupt.wanted)
                )
                stop_now = any(of_ranks[3])
                seconds = sum(phases[phase] for phase in ("data", "forward_backward", "optimizer", "other"))
                tokens = batch * self.settings.data.sequence_length
                if values is not None:
                    values |= {"samples": self.position.samples, "step_seconds": seconds} | rates.of(tokens, seconds)
                    values |= {f"{phase}_seconds": spent for phase, spent in phases.items()} | over_ranks(*of_ranks[:3])
                    self.report.step(step, values, tokens, seconds, write=last or step % trainer.log_interval == 0)
                for line in profiling.after(step):
                    self.report.say(line)
                with clock("save"):
                    self._tell(self.saver.poll())
                if trainer.eval_steps and (
                    last or (trainer.eval_interval and step % trainer.eval_interval == 0 and not stop_now)
                ):
                    self._validate()
                    stop_now = self.world.any(self.interrupt.wanted)
                if last or stop_now or step % self.settings.checkpoint.save_interval == 0:
                    self._save(wait=last or stop_now)
                if stop_now and not last:
                    self.report.end(f"interrupted: step {step} is saved; the same command goes on from there")
                    raise self.interrupt.exit()
        path = folder.checkpoint_folder(self.folder / folder.CHECKPOINTS, self.position.step)
        self.report.end(f"done: {self.position.step} steps, checkpoint {path}")

    def _step(self, data: Batches, batch: int) -> dict[str, Any] | None:
        """One step of `batch` samples; None if it was a bad one, whose update is left out."""
        step, samples = self.position.step + 1, self.position.samples + batch
        try:
            values = self.stepper.step(data, step, batch)
        except BadStep as bad:
            self.stepper.judge.count(step, bad)
            told = self._roll_back() if bad.policy == "rollback" else "its update is left out"
            self.report.say(f"warning: step {step}: {bad.what}; {told}")
            self.report.write(step, {"bad_step": bad.what})
            # The schedule goes on with the data, also from a checkpoint's place in it.
            self.training.scheduler.step(increment=samples - self.training.scheduler.num_steps)
            values = None
        self.position = replace(self.position, step=step, samples=samples)
        return values

    def _roll_back(self) -> str:
        """Take up the last checkpoint's weights, optimizer and random state; returns what there is to say about it."""
        self._tell(self.saver.poll(wait=True))
        latest = resume.newest_whole(self.folder / folder.CHECKPOINTS, self.world, self.report.say)
        if latest is None:
            raise UserError(
                f"step {self.position.step + 1}: a bad step, and no checkpoint yet to roll back to; lower "
                "optimizer.lr, or save earlier (checkpoint.save_interval)"
            )
        self.stepper.judge.remember(checkpoint.load(latest, self.settings, self.training).norms)
        return f"rolled back to the checkpoint of step {folder.step_of(latest)}, and reads on after the bad batch"

    def _validate(self) -> None:
        with self.stepper.clock("validation"):
            for name, held_out in self.datasets.validation.items():
                losses = self.stepper.validate(held_out, name)
                self.report.validation(self.position.step, name, losses.mean, losses.bits_per_byte)
                if not math.isfinite(losses.mean):
                    self._not_finite(f"step {self.position.step}: the loss of {name} is {losses.mean}")

    def _not_finite(self, what: str) -> None:
        """The weights are of no use any more. Raises UserError, before they are saved, unless faults.on_nan says on."""
        if self.settings.faults.on_nan == "stop":
            raise UserError(f"{what}; lower optimizer.lr: the same command goes on from the checkpoint before")
        self.report.say(f"warning: {what}")

    def _save(self, *, wait: bool) -> None:
        self.stepper.progress(f"saving step {self.position.step}")
        with self.stepper.clock("save"):
            position = replace(self.position, norms=self.stepper.judge.norms)
            self._tell(self.saver.save(self.training, position, wait=wait))

    def _tell(self, finished: list[Saved]) -> None:
        for saved in finished:
            values = {"saved_step": saved.step, "saved_seconds": saved.seconds, "saved_gib": saved.size / GIB}
            self.report.write(self.position.step, {**values, "save_stall_seconds": saved.stall_seconds})


def describe(settings: Settings, pattern: Pattern, world: World) -> Iterator[str]:
    """What is trained and on what, line by line: the pattern, the count of each kind and the ratios reached."""
    counts = ", ".join(
        f"{count} {LAYER_KINDS[symbol]}" for symbol, count in pattern.counts(include_mtp=False).items() if count
    )
    ratios = ", ".join(f"{LAYER_KINDS[symbol]} {share:.3f}" for symbol, share in pattern.ratios().items() if share)
    yield f"layer pattern {pattern}"
    yield f"{pattern.num_layers} layers: {counts} (ratios {ratios})"
    parallel = settings.parallel
    data_parallel = world.size // parallel.model_size
    yield (
        f"{world.size} process{'es' if world.size > 1 else ''} on {world.device.type}: data parallel {data_parallel}, "
        f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}"
    )


def _source(settings: Settings) -> Path | None:
    """The checkpoint whose weights the run starts from. Raises ConfigError if it cannot fit or is damaged."""
    if not settings.checkpoint.load:
        return None
    source = folder.find_checkpoint(settings.checkpoint.load, settings.folder)
    resume.refuse_newer(source)
    resume.refuse_other_model(source, settings)
    if damage := checksums.damage(source):
        raise ConfigError(Problem("checkpoint.load", f"the checkpoint '{source}' is damaged ({damage})"))
    return source


def _tokenizer(spec: str, latest: Path | None) -> Tokenizer:
    """The run's tokenizer; the one that its checkpoint carries if the files it was named by are gone."""
    try:
        return load_tokenizer(spec)
    except ConfigError:
        if latest is None or not (latest / folder.TOKENIZER).is_dir():
            raise
        return load_tokenizer(str(latest / folder.TOKENIZER))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

"""A checkpoint of any format, or a run by its name, ready to generate.

from recipes import open_generator
with open_generator("tiny") as model:
    print(model.generate("def ").text)
"""

import atexit
import logging
import multiprocessing
import multiprocessing.connection
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.config import Settings
from hybrid.costs import memory, parameters
from hybrid.data.chat_template import ChatTemplate, find_template, special_tokens
from hybrid.data.tokenizer import Tokenizer, load_tokenizer
from hybrid.errors import ConfigError, Problem, UserError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import Store

    from converters.checkpoint import Checkpoint
    from converters.layout import Layout
    from hybrid.config import ModelConfig
    from hybrid.generation.generator import Generator
    from hybrid.generation.runner import Room, Runner
    from hybrid.generation.weights import Weights

DTYPES = ("float32", "bfloat16", "float16")
_MINUTES = timedelta(minutes=10)  # to read a rank's weights
_FOREVER = timedelta(days=365)  # a follower waits for the next request
_WEIGHTS_A_THREAD = 2**17  # of a matrix; with fewer, threads wait for one another (benchmarks/generation_cpu.md)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What is opened, and how it is to run."""

    reference: str
    tokenizer: str | None = None  # a tokenizer's file or folder; None: the one that the checkpoint names or brings
    chat_template: str | None = None  # in Jinja; None: the tokenizer's own
    dtype: str | None = None  # None: the checkpoint's own on a GPU, float32 on a CPU
    tensor_parallel: int = 1
    slots: int = 32
    max_length: int = 4096
    prefill_chunk: int = 256
    batch_invariant: bool = False
    ssm_dtype: str | None = None
    known: Mapping[str, Any] = field(default_factory=dict)  # fields of the model that the checkpoint does not say
    allow: tuple[str, ...] = ()  # names that its pickles may hold

    def __post_init__(self) -> None:
        problems = [
            Problem(name, f"is {getattr(self, name)}; it must be 1 or more")
            for name in ("tensor_parallel", "slots", "max_length", "prefill_chunk")
            if getattr(self, name) < 1
        ]
        problems += [
            Problem(name, f"is '{getattr(self, name)}', which is not one of {', '.join(DTYPES)}")
            for name in ("dtype", "ssm_dtype")
            if getattr(self, name) not in (None, *DTYPES)
        ]
        if problems:
            raise ConfigError(problems)


def open_generator(reference: str | Path, *, max_waiting: int = 256, **options: Any) -> "Generator":
    """Load what a run's name, a run's folder or a checkpoint of any format means; `options` are fields of `Opening`.

    Raises ConfigError or UserError for what is not there, is damaged, has no tokenizer, or does not fit into memory;
    the last is said before anything is loaded.
    """
    from hybrid.generation.generator import Generator

    opening = Opening(reference=str(reference), **options)
    checkpoint = _checkpoint(opening)
    tokenizer = _tokenizer(opening, checkpoint)
    template = _chat_template(opening, checkpoint, tokenizer)
    opening = _limited(opening, checkpoint)
    _layout(opening, checkpoint)  # what cannot be shared so is said once, not by every rank
    _require_memory(opening, checkpoint)
    with _no_pool_here():
        runner = _runner(opening, checkpoint) if opening.tensor_parallel == 1 else _lead(opening, checkpoint)
    name = checkpoint.path.name if Path(opening.reference).exists() else opening.reference
    return Generator(
        runner,
        tokenizer,
        name,
        max_waiting=max_waiting,
        chat_template=template,
        plain_chats=checkpoint.settings is not None and checkpoint.settings.data.source == "sft",
        threads=_threads(opening, checkpoint),
    )


@contextmanager
def _no_pool_here() -> Iterator[None]:
    """Load in one thread: OpenMP keeps a pool for each thread that has computed with several.

    When all pools together have more threads than there are cores, libgomp has them sleep after each operation, which
    takes two thirds of a small model's tokens/s from the engine.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads(opening: Opening, checkpoint: "Checkpoint") -> int:
    """Threads of a rank on a CPU: no more than the products of a decoding step have work for."""
    import torch

    model = checkpoint.model
    mean = parameters.active(Settings(name="", model=model)) / (2 * model.pattern.num_layers + 1)
    useful = max(1, round(mean / opening.tensor_parallel / _WEIGHTS_A_THREAD))
    return min(max(1, torch.get_num_threads() // opening.tensor_parallel), useful)


def _checkpoint(opening: Opening) -> "Checkpoint":
    from converters import convert

    checkpoint = convert.open_checkpoint(opening.reference, opening.known, opening.allow)
    checkpoint.require_complete()
    checkpoint.require_expressed()
    model = checkpoint.model
    if model.padded_vocab_size % opening.tensor_parallel:
        checkpoint = convert.with_rows(checkpoint, model.vocab_size, 8 * opening.tensor_parallel)
    return checkpoint


def _limited(opening: Opening, checkpoint: "Checkpoint") -> Opening:
    """With no more positions than there are learned ones."""
    learned = checkpoint.tensors.get("embedding.position_embeddings.weight")
    if learned is None:
        return opening
    return replace(opening, max_length=min(opening.max_length, learned.shape[0]))


def _chat_template(opening: Opening, checkpoint: "Checkpoint", tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that was named, else the tokenizer's own, else one that lies beside it."""
    folder = Path(opening.tokenizer) if opening.tokenizer is not None else checkpoint.tokenizer_folder
    try:
        if opening.chat_template is not None:
            template = ChatTemplate(opening.chat_template, special_tokens(folder) if folder else ())
            _require_jinja(template)
            return template
        return tokenizer.chat_template or (find_template(folder) if folder else None)
    except ValueError as error:
        raise ConfigError(Problem("--tokenizer", f"'{folder}' cannot be read: {error}")) from None


def _require_jinja(template: ChatTemplate) -> None:
    try:
        template.check()
    except ValueError as error:
        raise ConfigError(Problem("--chat-template", str(error))) from None


def _tokenizer(opening: Opening, checkpoint: "Checkpoint") -> Tokenizer:
    if opening.tokenizer is not None:
        return load_tokenizer(opening.tokenizer, "--tokenizer")
    if folder := checkpoint.tokenizer_folder:  # what it carries with it; the files it was trained with may be gone
        return load_tokenizer(str(folder), "--tokenizer")
    if checkpoint.settings is not None:
        return load_tokenizer(checkpoint.settings.data.tokenizer)
    message = f"{checkpoint.path} has no tokenizer beside it; name a file or folder, or 'byte'"
    raise ConfigError(Problem("--tokenizer", message))


def _dtype(opening: Opening, checkpoint: "Checkpoint") -> "torch.dtype":
    import torch

    if opening.dtype is not None:
        return getattr(torch, opening.dtype)
    if not torch.cuda.is_available():
        return torch.float32
    most = max(checkpoint.dtypes.items(), key=lambda item: item[1])[0]
    return getattr(torch, most) if most in DTYPES else torch.bfloat16


def _require_memory(opening: Opening, checkpoint: "Checkpoint") -> None:
    """Raise UserError if the weights and the sequences' states do not fit, with the numbers."""
    import psutil
    import torch

    dtype, ranks = _dtype(opening, checkpoint), opening.tensor_parallel
    needs = memory.inference(Settings(name="", model=checkpoint.model), dtype.itemsize)
    rows = opening.slots + min(opening.slots, 8)
    state = rows * (needs.state_per_sequence + needs.cache_per_token * opening.max_length)
    if torch.cuda.is_available():
        if ranks > torch.cuda.device_count():
            raise ConfigError(Problem("--tensor-parallel", f"is {ranks}; there are {torch.cuda.device_count()} GPUs"))
        free, where, share = min(torch.cuda.mem_get_info(i)[0] for i in range(ranks)), "the GPU", ranks
    else:
        free, where, share = psutil.virtual_memory().available, "this machine", 1
    wanted = (needs.weights + state) / share
    if wanted > free:
        raise UserError(
            f"{checkpoint.path} needs {_gib(wanted)} ({_gib(needs.weights / share)} of weights as "
            f"{str(dtype).removeprefix('torch.')}, {_gib(state / share)} for {opening.slots} sequences of "
            f"{opening.max_length} positions), and {where} has {_gib(free)} free; "
            "fewer --slots, a smaller --max-length or --dtype bfloat16 take less"
        )


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _room(opening: Opening) -> "Room":
    import torch

    from hybrid.generation.runner import Room

    return Room(
        slots=opening.slots,
        max_length=opening.max_length,
        prefill_chunk=opening.prefill_chunk,
        batch_invariant=opening.batch_invariant,
        ssm_dtype=getattr(torch, opening.ssm_dtype) if opening.ssm_dtype else None,
    )


def _layout(opening: Opening, checkpoint: "Checkpoint") -> "tuple[ModelConfig, Layout]":
    """The model in one stage, and how its ranks share it. Raises ConfigError if they cannot."""
    from converters import layout

    model = replace(checkpoint.model, layer_pattern=str(checkpoint.model.pattern).replace("|", ""))
    return model, layout.target(model, tensor=opening.tensor_parallel)


def _weights(
    opening: Opening, checkpoint: "Checkpoint", rank: int = 0, group: "dist.ProcessGroup | None" = None
) -> "Weights":
    """Read this rank's part, a tensor at a time."""
    import torch

    from converters import layout, megatron
    from converters.streams import Reader
    from hybrid.generation import weights

    model, target = _layout(opening, checkpoint)
    shards = layout.shards(checkpoint.tensors, model, target)[rank, 0, 0]
    named = {megatron.live_name(name, model): part for name, part in shards.items()}
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    with Reader() as reader:
        return weights.build(
            model,
            lambda name: reader.tensor(named[name]),
            device=device,
            dtype=_dtype(opening, checkpoint),
            group=group,
        )


def _runner(opening: Opening, checkpoint: "Checkpoint") -> "Runner":
    from hybrid.generation.runner import Runner

    return Runner(_weights(opening, checkpoint), _room(opening))


def _lead(opening: Opening, checkpoint: "Checkpoint") -> "Runner":
    """Rank 0 of several: start the others, processes of this machine that end with this one."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_follow, args=(opening, rank, port), daemon=True, name=f"rank {rank}")
        for rank in range(1, opening.tensor_parallel)
    ]
    for process in others:
        process.start()
        atexit.register(process.kill)  # before multiprocessing's own terminate, which they do not hear, and its wait
    return _joined(opening, checkpoint, 0, port, others)


def _follow(opening: Opening, rank: int, port: int) -> None:
    """Another rank: do what rank 0 does, until it stops or is gone."""
    import signal

    import torch

    for number in (signal.SIGINT, signal.SIGTERM):  # which a shell or a service manager sends to all processes
        signal.signal(number, signal.SIG_IGN)  # rank 0 says when it is over
    threading.Thread(target=_end_with_parent, daemon=True, name="watch of rank 0").start()
    checkpoint = _checkpoint(opening)
    torch.set_num_threads(_threads(opening, checkpoint))
    runner = _joined(opening, checkpoint, rank, port, [])
    try:
        runner.follow()
    except RuntimeError:  # rank 0 is gone
        return


def _end_with_parent() -> None:
    """End this process when rank 0 is gone, whatever it is waiting for: NCCL would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _joined(
    opening: Opening, checkpoint: "Checkpoint", rank: int, port: int, others: "Sequence[BaseProcess]"
) -> "Runner":
    """The part of a rank; `others` are the processes of the ranks that this one, rank 0, leads."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    from hybrid.generation.runner import Runner

    size, cuda = opening.tensor_parallel, torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    store = TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=_MINUTES, wait_for_workers=False)
    _meet(store, "started", rank, others)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=_FOREVER)
    control = dist.new_group(backend="gloo", timeout=_FOREVER)
    group = dist.group.WORLD
    assert group is not None and isinstance(control, dist.ProcessGroup)
    weights = _weights(opening, checkpoint, rank, group)
    _meet(store, "loaded", rank, others)
    if cuda and others:
        threading.Thread(target=_abort_without, args=(others,), daemon=True, name="watch of the ranks").start()
    try:
        return Runner(weights, _room(opening), control)
    except RuntimeError as error:
        for process in others:
            if process.exitcode:
                raise UserError(_ended(process, others)) from error
        raise


def _meet(store: "Store", where: str, rank: int, others: "Sequence[BaseProcess]") -> None:
    """Say that a rank has come so far; rank 0 waits for the others, as long as they live."""
    store.set(f"{where} {rank}", "")
    for process in others:
        while not store.check([f"{where} {process.name.removeprefix('rank ')}"]):
            if not process.is_alive():
                raise UserError(_ended(process, others))
            time.sleep(0.02)


def _ended(process: "BaseProcess", others: "Sequence[BaseProcess]") -> str:
    said = f"has ended (exit code {process.exitcode}) before the model was loaded"
    return f"{process.name} of {len(others) + 1} {said}; what it said stands above"


def _abort_without(others: "Sequence[BaseProcess]") -> None:
    """When another rank dies, break off what rank 0 would wait for: unlike gloo, NCCL does not see it."""
    from hybrid.generation.runner import break_off

    running = {process.sentinel: process for process in others}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            process = running.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            if process.exitcode:
                logging.getLogger(__name__).error("%s has ended (exit code %s)", process.name, process.exitcode)
                break_off()
                return

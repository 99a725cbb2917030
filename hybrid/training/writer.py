"""Writing one rank's part of a checkpoint, in this process or in one of its own while the training goes on.

megatron-core plans a save, writes it and completes it; its own asynchronous writing is a forked process (its
`TemporalAsyncCaller`), which has a copy of everything on the CPU for nothing. What is on a GPU is copied to the host
first, and that is what the training waits for. Here it goes to one pinned buffer that all saves of a run share, at
the speed of the bus, and that the forked process sees without a copy.
"""

import contextlib
import ctypes
import json
import mmap
import os
import pickle
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from hybrid.training import checksums

_RESULTS, _SUMS = ".results-", ".checksums-"
_ALIGNMENT = 512
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Results:
    """Hands over what was written through a file: what upstream takes from a queue.

    Its own queue needs one more process; a pipe would be full before the training process looks into it.
    """

    def __init__(self, path: Path):
        self._path = path

    def put(self, results: Any) -> None:
        """Leave the results; where that fails, nothing is found later, which is a failed save."""
        try:
            self._path.write_bytes(pickle.dumps(results))
        except (OSError, TypeError):
            self._path.unlink(missing_ok=True)

    def get_nowait(self) -> Any:
        """The results. Raises queue.Empty if there are none, as when the process that wrote was killed."""
        try:
            return pickle.loads(self._path.read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            raise queue.Empty from None


class HostBuffer:
    """Memory of the host that forked processes share, pinned where there is a GPU. It lives as long as this does."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def __del__(self) -> None:
        self._release()

    def stage(self, buckets: list[Any]) -> list[Any]:
        """Return upstream's buckets (path, name, (bytes, tensors)) with every tensor of a GPU copied to the host."""
        tensors = [tensor for _, _, (_, parts) in buckets for _, tensor in parts if tensor.is_cuda]
        self._reserve(sum(_aligned(tensor) for tensor in tensors))
        offset, staged = 0, []
        for path, name, (data, parts) in buckets:
            copies = []
            for item, tensor in parts:
                if tensor.is_cuda:
                    copies.append((item, self._copy(tensor, offset)))
                    offset += _aligned(tensor)
                else:
                    copies.append((item, tensor))
            staged.append((path, name, (data, copies)))
        torch.cuda.synchronize()
        return staged

    def _copy(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        assert self._memory is not None
        if not tensor.numel():
            return tensor.cpu()
        copy = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return copy.view(tensor.shape).copy_(tensor, non_blocking=True)

    def _reserve(self, size: int) -> None:
        if not size or (self._memory is not None and len(self._memory) >= size):
            return
        self._release()
        self._memory = mmap.mmap(-1, size)
        # Without this, copies are slower and nothing else: the result is of no interest.
        self._runtime().cudaHostRegister(self._address(), size, 0)

    def _release(self) -> None:
        if self._memory is not None:
            self._runtime().cudaHostUnregister(self._address())
            self._memory = None

    def _address(self) -> int:
        assert self._memory is not None
        return torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()

    def _runtime(self) -> Any:
        return torch.cuda.cudart()


@contextlib.contextmanager
def results_in(folder: Path, rank: int) -> Iterator[None]:
    """Let what megatron-core plans in here hand its results over through a file in the checkpoint's folder."""
    upstream: Any = filesystem_async
    before, upstream._results_queue = upstream._results_queue, Results(folder / f"{_RESULTS}{rank}")
    try:
        yield
    finally:
        upstream._results_queue = before


def request(planned: AsyncRequest, folder: Path, rank: int, buffer: HostBuffer, *, own_process: bool) -> AsyncRequest:
    """Return megatron-core's request with checksums and, where there is a GPU, the shared buffer."""
    if planned.async_fn is None:
        return planned
    buckets = planned.async_fn_args[1]
    parent = os.getpid() if own_process else None
    write = partial(_write, planned.async_fn, folder, parent)
    preload = partial(buffer.stage, buckets) if torch.cuda.is_available() else None
    return planned._replace(async_fn=write, preload_fn=preload)


def collect_sums(folder: Path) -> dict[str, dict[str, Any]]:
    """The checksums that the ranks have left, by file; removes what is no part of a checkpoint."""
    sums: dict[str, dict[str, Any]] = {}
    for path in folder.glob(f"{_SUMS}*"):
        sums |= json.loads(path.read_text())
        path.unlink()
    for path in folder.glob(f"{_RESULTS}*"):
        path.unlink()
    return sums


def _write(
    write: Callable[..., None], folder: Path, parent: int | None, rank: int, buckets: list[Any], results: Any
) -> None:
    """Write this rank's files and their checksums. An error is left in `results`, or shows as there being none."""
    if parent is not None:
        _end_with(parent)
    write(rank, buckets, results)
    try:
        sums = {Path(path).name: checksums.of(Path(path)) for path, _, _ in buckets}
        (folder / f"{_SUMS}{rank}").write_text(json.dumps(sums))
    except OSError:
        pass  # the file that is not there is the one that `write` has reported


def _end_with(parent: int) -> None:
    """Have this process end when the one that forked it does, and let only that one answer signals to save."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT

"""megatron-core on a machine without CUDA.

megatron-core says "cuda" where it means "the device of this process". `enable()` makes that phrase mean the CPU, for
the whole process and for good, so that the model, DDP, the distributed optimizer and the pipeline schedules run
unchanged over gloo. It is never called where there is a CUDA device.

What it changes, and why each is enough:

- Factory calls and `Tensor.to`/`Tensor.cuda` with `device="cuda"` (schedules, optimizer, gradient clipping) give CPU
  tensors. A `TorchFunctionMode` does this: it sees the call, whoever makes it, and leaves everything else alone.
- Memory is not pinned for copies to a GPU (rotary positions under context parallelism ask for it).
- `Tensor.type()` answers `torch.cuda.FloatTensor` for a float32 tensor: the optimizer sorts parameters by that string.
- `torch.cuda.current_device` answers `torch.device("cpu")`, which the factory calls accept; streams and events do
  nothing, since every operation on the CPU is finished when it returns.
- The "CUDA" random state is torch's CPU generator, so that the tracker that gives tensor-parallel ranks different
  dropout, and activation recomputation, work as on a GPU.
- Gathers and scatters take parts of unequal length, as NCCL's do (`hybrid.model.gloo`).
- How many tokens each expert gets is made an array on its way to the host, also when it is there already.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_enabled = False


def _means_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, int) and not isinstance(device, bool)
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Reads "cuda" as "cpu" in every torch call of this thread."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return f"torch.cuda.{func(args[0]).removeprefix('torch.')}"
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if "device" in kwargs and _means_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        elif func is torch.Tensor.to and len(args) > 1 and _means_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _Event:
    """An event of a stream on which everything is already done."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, *_: Any) -> None:
        """It has happened."""

    wait = synchronize = record


class _Stream:
    """A stream on which everything is already done."""

    def __init__(self, *_: Any, **__: Any):
        self.device = _CPU

    def wait_stream(self, _: Any) -> None:
        """Nothing to wait for."""

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> Any:
        """An event that has happened."""
        return event or _Event()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """One priority only."""
        return (0, 0)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _as_split(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def enable() -> None:
    """Let megatron-core run on the CPU from here on. Call it before a model is built; calling it again does nothing."""
    global _enabled
    if _enabled:
        return
    _enabled = True
    assert not torch.cuda.is_available(), "a machine with CUDA takes CUDA"

    from megatron.core.tensor_parallel import random as parallel_random
    from megatron.core.transformer.moe import token_dispatcher

    from hybrid.model import gloo

    gloo.enable()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = cuda.synchronize = cuda.empty_cache = _nothing
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.current_stream = _Stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    state: Any = parallel_random
    state._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    state._set_cuda_rng_state = lambda new_state, *_, **__: torch.set_rng_state(new_state)

    dispatcher: Any = token_dispatcher
    dispatcher.maybe_move_tensor_to_cpu = _as_split

    _CudaMeansCpu().__enter__()

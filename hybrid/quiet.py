"""Imported before megatron-core by whatever runs it: a quick and quiet start.

- Leaves out what torch and megatron-core print about packages that a run here does without; `hybrid doctor` says what
  is missing, and what to do about it, to whoever asks.
- Where there is no CUDA device, megatron-core's small fusions stay plain functions. It hands them to `torch.compile`,
  which costs seconds at import and in the first step, and needs a C++ compiler on the machine. Packages of CUDA kernels
  are not looked at there: megatron-core takes their optimizer wherever they are installed.
- Packages that megatron-core's own timers log to are not loaded by its import, a second for every rank: its timers are
  not used here, and what logs a run (hybrid/training/trackers.py) loads them when they are asked for.
"""

import logging
import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore", module=r"megatron\..*")
warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint.*")
warnings.filterwarnings("ignore", message="(Transformer Engine|Apex)")
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
warnings.filterwarnings("ignore", category=SyntaxWarning)
for _name in ("torch.utils.cpp_extension", "megatron"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# A save that fails is said once, with the checkpoint's name (hybrid/training/checkpoint.py).
logging.getLogger("megatron.core.dist_checkpointing.strategies.filesystem_async").setLevel(logging.CRITICAL)

import torch  # noqa: E402


def _as_it_is(function: Any = None, **_: Any) -> Any:
    return function if function is not None else _as_it_is


_compile = torch.compile
_left_out = [_name for _name in ("wandb", "tensorboard") if _name not in sys.modules]
if not torch.cuda.is_available():
    for _name in ("transformer_engine", "apex", "mamba_ssm", "causal_conv1d", "fla"):
        sys.modules.setdefault(_name, None)  # type: ignore[arg-type]
    torch.compile = _as_it_is
sys.modules.update(dict.fromkeys(_left_out))  # type: ignore[arg-type]: Python's mark of a module not to be found
try:
    import megatron.core  # noqa: F401
finally:
    torch.compile = _compile
    for _name in _left_out:
        del sys.modules[_name]

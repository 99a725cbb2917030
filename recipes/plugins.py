"""What a recipe can ask to be arranged around its run, by name: `plugins=[performance, 'nsys(trace=cuda)']`.

A plug-in is a function of `Surroundings` and the run's settings, with arguments of its own. A user's is named like a
user's recipe: `path/to/file.py:function`. The names and what they do are those of NeMo's plug-ins; its values of
environment variables are in `megatron/bridge/recipes/run_plugins.py`.
"""

import getpass
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem, nearest
from recipes import registry


@dataclass
class Surroundings:
    """What is arranged: variables of the run's processes, words before the command that starts them on each node,
    folders that are made in the run's, and the seconds before the end at which Slurm warns (None: as the executor has
    it).
    """

    env: dict[str, str] = field(default_factory=dict)
    prefix: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    warning: int | None = None


def performance(around: Surroundings, built: Settings, connections: int = 1, norm_margin: int = 16) -> None:
    """Environment for speed on GPUs: messages of tensor and context parallelism overlap with computation.

    One hardware queue (`connections`) keeps kernels in the order in which they were launched, up to Hopper; Blackwell
    takes 32. `norm_margin` multiprocessors are left free by transformer-engine's norms for messages.
    """
    if built.parallel.tensor > 1 or built.parallel.context > 1:
        around.env["CUDA_DEVICE_MAX_CONNECTIONS"] = str(connections)
    around.env["NVTE_FWD_LAYERNORM_SM_MARGIN"] = str(norm_margin)
    around.env["NVTE_BWD_LAYERNORM_SM_MARGIN"] = str(norm_margin)
    # Segments that grow instead of many of fixed sizes: less memory lost between them.
    around.env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def triton_cache(around: Surroundings, built: Settings, folder: str = "") -> None:
    """Keep compiled Triton kernels on each node's own disk: on a shared one, many processes write the same files."""
    around.env["TRITON_CACHE_DIR"] = folder or f"/tmp/triton-cache-{getpass.getuser()}"


def preemption(around: Surroundings, built: Settings, seconds: int = 120) -> None:
    """Have Slurm warn the run so many seconds before its time limit, and before it yields to another job."""
    around.warning = seconds


def nsys(around: Surroundings, built: Settings, trace: str = "cuda,nvtx", delay: int = 0, duration: int = 0) -> None:
    """Profile each node with Nsight Systems, from `delay` seconds after the start for `duration` seconds (0: all)."""
    options = [f"--trace={trace}", "--sample=none", "--cpuctxsw=none", "--force-overwrite=true"]
    options += [f"--delay={delay}"] if delay else []
    # The run goes on when the profile is complete.
    options += [f"--duration={duration}", "--kill=none"] if duration else []
    around.folders.append("nsys")
    # %h and %p are nsys's: host and process.
    around.prefix += ["nsys", "profile", *options, f"--output={built.folder}/{built.name}/nsys/%h-%p"]


def wandb(around: Surroundings, built: Settings, project: str = "hybrid-recipes", entity: str = "") -> None:
    """Log to Weights & Biases; a run that goes on goes on there, too.

    The key comes from WANDB_API_KEY where this is started, or from ~/.netrc where the job runs; it is never written
    into a job's script.
    """
    around.folders.append("wandb")
    around.env |= {
        "WANDB_PROJECT": project,
        "WANDB_NAME": built.name,
        "WANDB_RUN_ID": built.name,
        "WANDB_RESUME": "allow",
        "WANDB_DIR": f"{built.folder}/{built.name}",
    }
    if entity:
        around.env["WANDB_ENTITY"] = entity


PLUGINS: dict[str, Callable[..., None]] = {
    "performance": performance,
    "triton_cache": triton_cache,
    "preemption": preemption,
    "nsys": nsys,
    "wandb": wandb,
}


def arrange(built: Settings) -> Surroundings:
    """Return what the run's plug-ins arrange. Raises ConfigError for names and arguments that mean nothing."""
    around, problems = Surroundings(), []
    for text in built.plugins:
        try:
            target, arguments = registry.split_call(text)
            registry.call(target, _function(target), arguments, first=(around, built))
        except ConfigError as error:
            problems += [
                Problem(f"plugins: {problem.place}", problem.message, problem.detail) for problem in error.problems
            ]
    if problems:
        raise ConfigError(problems)
    return around


def _function(target: str) -> Callable[..., Any]:
    if ".py:" in target:
        return registry.load_function(target)
    if target not in PLUGINS:
        detail = f"valid names: {', '.join(PLUGINS)}, or path/to/file.py:function"
        raise ConfigError(Problem(target, f"there is no plug-in of this name{nearest(target, PLUGINS)}", detail))
    return PLUGINS[target]

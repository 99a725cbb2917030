"""Named recipes, their parts, and what can be done with them. Everything is imported when it is asked for."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.executors import docker as docker
    from recipes.executors import local as local
    from recipes.executors import slurm as slurm
    from recipes.generating import open_generator as open_generator
    from recipes.laptop import tiny as tiny
    from recipes.launching import launch as launch
    from recipes.nemo import to_nemo_run as to_nemo_run
    from recipes.nemotron_h import nemotron_h_4b as nemotron_h_4b
    from recipes.nemotron_h import nemotron_h_8b as nemotron_h_8b
    from recipes.nemotron_h import nemotron_h_47b as nemotron_h_47b
    from recipes.nemotron_h import nemotron_h_56b as nemotron_h_56b
    from recipes.nemotron_h import nemotron_nano_9b_v2 as nemotron_nano_9b_v2
    from recipes.nemotron_h import nemotron_nano_12b_v2 as nemotron_nano_12b_v2
    from recipes.nodes import config as config
    from recipes.nodes import partial as partial
    from recipes.overrides import apply as apply
    from recipes.registry import resolve as resolve
    from recipes.seed import hybrid_8b as hybrid_8b
    from recipes.seed import hybrid_800m as hybrid_800m
    from recipes.settle import check as check
    from recipes.settle import settings as settings
    from recipes.state_spaces import mamba2_1_3b as mamba2_1_3b
    from recipes.state_spaces import mamba2_2_7b as mamba2_2_7b
    from recipes.state_spaces import mamba2_130m as mamba2_130m
    from recipes.state_spaces import mamba2_370m as mamba2_370m
    from recipes.state_spaces import mamba2_780m as mamba2_780m
    from recipes.state_spaces import mamba_1_4b as mamba_1_4b
    from recipes.state_spaces import mamba_2_8b as mamba_2_8b
    from recipes.state_spaces import mamba_130m as mamba_130m
    from recipes.state_spaces import mamba_370m as mamba_370m
    from recipes.state_spaces import mamba_790m as mamba_790m
    from recipes.study import mamba2_8b as mamba2_8b
    from recipes.study import mamba_8b as mamba_8b
    from recipes.study import transformer_8b as transformer_8b
    from recipes.variants import finetune as finetune
    from recipes.variants import shrink as shrink

# Where the public names that are no recipes live; no module is called like one of them.
_HOME = {
    "config": "recipes.nodes",
    "partial": "recipes.nodes",
    "apply": "recipes.overrides",
    "resolve": "recipes.registry",
    "settings": "recipes.settle",
    "check": "recipes.settle",
    "finetune": "recipes.variants",
    "shrink": "recipes.variants",
    "to_nemo_run": "recipes.nemo",
    "launch": "recipes.launching",
    "open_generator": "recipes.generating",
    "local": "recipes.executors",
    "slurm": "recipes.executors",
    "docker": "recipes.executors",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name.startswith("_"):
        raise AttributeError(f"module 'recipes' has no attribute '{name}'")
    # `from recipes import parts` asks here first; looking for a recipe would import the module that is asking.
    if importlib.util.find_spec(f"recipes.{name}"):
        return importlib.import_module(f"recipes.{name}")
    registry = importlib.import_module("recipes.registry")
    if name in registry.entries():
        return registry.entries()[name].function
    raise AttributeError(f"module 'recipes' has no attribute '{name}'")


def __dir__() -> list[str]:
    registry = importlib.import_module("recipes.registry")
    return [*globals(), *_HOME, *registry.entries()]

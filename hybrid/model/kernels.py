"""Which kernels this machine has, which of them a model takes, and why.

Independent choices, all made from `model.kernels`, the GPU and the packages that are installed:

- the linear layers, norms, attention and the loss: transformer-engine's modules, or Megatron's parallel linears with
  torch norms and `scaled_dot_product_attention`;
- the Mamba mixers: the kernels of mamba-ssm and causal-conv1d, or the PyTorch reference beside each of them;
- gated delta nets: fla-core's kernels, or Megatron's own PyTorch.

`auto` takes every fused kernel that is there, `fused` asks for all of them, `reference` for none. Parameters and
checkpoints are the same either way. Importing this module imports no torch.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from hybrid import installing
from hybrid.config import Settings
from hybrid.errors import ConfigError, Problem

FP8_CAPABILITY = (8, 9)  # Ada and Hopper on


@dataclass(frozen=True)
class Package:
    """A package with CUDA kernels: the module that shows whether it works, the oldest version that does, its use.

    `below`: the first version that no longer works, "" if there is none.
    """

    name: str
    module: str
    minimum: str
    arguments: str  # of pip install
    gives: str
    below: str = ""

    @property
    def install(self) -> str:
        """What installs it here."""
        return installing.command(self.arguments)


TRANSFORMER_ENGINE = Package(
    "transformer-engine",
    "transformer_engine.pytorch",
    "2.9",
    "--no-build-isolation 'transformer-engine[core_cu13,pytorch]>=2.9'",
    "linear layers with their norm, attention, cross entropy, optimizer, FP8",
)
MAMBA_SSM = Package(
    "mamba-ssm",
    "mamba_ssm.ops.triton.ssd_combined",
    "2.3",
    "--no-build-isolation 'mamba-ssm>=2.3'",
    "the scans of Mamba-1 and Mamba-2, the gated norm",
)
CAUSAL_CONV1D = Package(
    "causal-conv1d",
    "causal_conv1d",
    "1.5",
    "--no-build-isolation 'causal-conv1d>=1.5'",
    "the short convolution of Mamba layers",
)
FLA = Package(
    "fla-core",
    "fla.modules.convolution",
    "0.4",
    "'fla-core[cuda]>=0.4,<0.6'",
    "the gated delta rule of G layers",
    below="0.6",  # which has moved the modules that megatron-core 0.19 imports
)
PACKAGES = (TRANSFORMER_ENGINE, MAMBA_SSM, CAUSAL_CONV1D, FLA)


@dataclass(frozen=True)
class Machine:
    """What counts for the choice: the GPU, and what is wrong with each package ("" if nothing is)."""

    gpu: str | None  # name of the CUDA device of this process
    capability: tuple[int, int]
    versions: dict[str, str | None]
    problems: dict[str, str]

    def lacks(self, *packages: Package) -> list[Package]:
        """Those of `packages` that cannot be used here."""
        return [package for package in packages if self.problems[package.name]]


@dataclass(frozen=True)
class Choice:
    """What a model is built from; `reasons` says why, a sentence for each of the three."""

    transformer_engine: bool
    mamba: bool
    delta: bool
    reasons: tuple[str, str, str]


@cache
def machine() -> Machine:
    """Look at this machine: imports torch, and on a GPU the packages, to see whether they load."""
    import torch

    cuda = torch.cuda.is_available()
    versions = {package.name: _version(package.name) for package in PACKAGES}
    problems = {package.name: _problem(package, versions[package.name], load=cuda) for package in PACKAGES}
    return Machine(
        torch.cuda.get_device_name() if cuda else None,
        torch.cuda.get_device_capability() if cuda else (0, 0),
        versions,
        problems,
    )


def choose(wanted: str, here: Machine) -> Choice:
    """What `model.kernels` = `wanted` means on this machine; `check` says whether it can be had."""
    if wanted == "reference":
        return _none("model.kernels is 'reference'")
    if here.gpu is None:
        return _none("there is no CUDA device")
    engine, mamba, delta = here.lacks(TRANSFORMER_ENGINE), here.lacks(MAMBA_SSM, CAUSAL_CONV1D), here.lacks(FLA)
    return Choice(
        not engine,
        not mamba,
        not delta,
        (
            f"torch modules: {_why(engine, here)}" if engine else "transformer-engine",
            f"PyTorch reference: {_why(mamba, here)}" if mamba else "mamba-ssm and causal-conv1d",
            f"PyTorch reference: {_why(delta, here)}" if delta else "fla-core",
        ),
    )


def _none(reason: str) -> Choice:
    reference = f"PyTorch reference: {reason}"
    return Choice(False, False, False, (f"torch modules: {reason}", reference, reference))


def check(settings: Settings, here: Machine) -> list[Problem]:
    """What the settings ask of the machine that it does not have."""
    problems = []
    wanted, precision = settings.model.kernels, settings.trainer.precision
    delta = "G" in settings.model.pattern.text
    missing = [package for package in here.lacks(*PACKAGES) if package is not FLA or delta]
    if wanted == "fused" and here.gpu is None:
        problems.append(
            Problem("model.kernels", "is 'fused', but there is no CUDA device; set it to 'auto' or 'reference'")
        )
    elif wanted == "fused":
        problems += [
            Problem("model.kernels", f"is 'fused', but {package.name} {_here(package, here)}; {package.install}")
            for package in missing
        ]
    if delta and settings.data.source == "sft" and not choose(wanted, here).delta:
        problems.append(
            Problem(
                "data.source",
                "is 'sft', which packs sequences into a row; gated delta nets (G) keep them apart only with "
                f"{FLA.name}'s kernels on CUDA ({FLA.install}); here they are PyTorch, for "
                f"{choose(wanted, here).reasons[2].partition(': ')[2]}",
            )
        )
    needs = []
    if precision.startswith("fp8"):
        needs.append(("trainer.precision", f"is '{precision}'", "set it to 'bf16'"))
        if here.gpu is not None and here.capability < FP8_CAPABILITY:
            problems.append(
                Problem(
                    "trainer.precision",
                    f"is '{precision}', which the GPU ({here.gpu}) cannot do; set it to 'bf16'",
                )
            )
    if settings.optimizer.precision_aware:
        needs.append(("optimizer.precision_aware", "is True", "set it to False"))
    for place, value, way_out in needs:
        if here.gpu is None:
            problems.append(Problem(place, f"{value}, which needs a CUDA device, and there is none; {way_out}"))
        elif TRANSFORMER_ENGINE in missing:
            package = TRANSFORMER_ENGINE
            problems.append(
                Problem(place, f"{value}, but {package.name} {_here(package, here)}; {package.install}, or {way_out}")
            )
    return problems


def require(settings: Settings) -> None:
    """Raise ConfigError with all that the settings ask of this machine and that it does not have."""
    problems = check(settings, machine())
    if problems:
        raise ConfigError(problems)


def of(settings: Settings) -> Choice:
    """What a model of these settings is built from on this machine."""
    return choose(settings.model.kernels, machine())


def _why(packages: list[Package], here: Machine) -> str:
    return " and ".join(f"{package.name} {_here(package, here)}" for package in packages)


def _here(package: Package, here: Machine) -> str:
    return here.problems[package.name]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _problem(package: Package, version: str | None, *, load: bool) -> str:
    """What is wrong with a package, as the end of a sentence that begins with its name."""
    if version is None:
        return "is not installed"
    if _numbers(version) < _numbers(package.minimum):
        return f"is {version}, older than {package.minimum}"
    if package.below and _numbers(version) >= _numbers(package.below):
        return f"is {version}, not below {package.below}"
    if load:
        try:
            importlib.import_module(package.module)
        except Exception as error:  # an extension built for another torch fails in many ways
            return f"{version} does not load ({str(error).strip().splitlines()[0] if str(error) else error!r})"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.3.2.post1" is (2, 3, 2)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)

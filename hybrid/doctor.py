"""What this machine has and lacks for hybrid models, which kernels a model takes here and why, and what to do about it.

`examine` imports torch; importing this module does not.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal

from packaging.requirements import Requirement

from hybrid import installing
from hybrid.model import kernels

PROJECT = "hybrid-recipes"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `state` is "ok", "missing" (no run works without it) or "optional" (and absent)."""

    name: str
    state: Literal["ok", "missing", "optional"]
    says: str
    way_out: str = ""


@dataclass
class Diagnosis:
    """Everything that was found, by section in the order in which it is shown."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether recipes run here, on whatever device there is."""
        return all(it.state != "missing" for found in self.sections.values() for it in found)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        sections = {name: [asdict(finding) for finding in found] for name, found in self.sections.items()}
        return {"healthy": self.healthy, **sections}

    def text(self) -> str:
        """The same for a person: a line for each thing, and under what is absent, the way out."""
        width = max(len(it.name) for found in self.sections.values() for it in found)
        marks = {"ok": " ", "missing": "!", "optional": "-"}
        lines = []
        for title, found in self.sections.items():
            lines += ["", title] if lines else [title]
            for it in found:
                lines.append(f"{marks[it.state]} {it.name:<{width}}  {it.says}".rstrip())
                if it.way_out:
                    lines.append(f"  {'':<{width}}  -> {it.way_out}")
        absent = "something that every run needs is missing (!)" if not self.healthy else "recipes run here"
        return "\n".join([*lines, "", f"{absent}; '-' is what this machine does without"])


def examine() -> Diagnosis:
    """Look at this machine. Nothing is changed, and nothing is asked of the network."""
    here = kernels.machine()
    return Diagnosis(
        {
            "machine": list(_machine(here)),
            "packages": list(_requirements()),
            "kernels": list(_kernels(here)),
            "clusters and containers": list(_tools()),
        }
    )


def _machine(here: kernels.Machine) -> Iterator[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory().total / 2**30
    yield Finding("system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("Python", "ok", platform.python_version())
    yield Finding("CPU", "ok", f"{os.cpu_count()} cores, {memory:.0f} GiB of memory")
    if here.gpu is None:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("GPU", "optional", f"none ({built}); models run on the CPU, in PyTorch", _why_no_gpu())
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}",
            "ok",
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}, "
            f"CUDA {torch.version.cuda}",
        )
    if here.capability < kernels.FP8_CAPABILITY:
        wanted = ".".join(map(str, kernels.FP8_CAPABILITY))
        yield Finding("FP8", "optional", f"no: takes compute capability {wanted}; use trainer.precision=bf16")


def _why_no_gpu() -> str:
    """What to do about a GPU that the driver sees and torch does not; nothing where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    if not _ask(["nvidia-smi", "-L"]):
        return "nvidia-smi is here and shows no GPU: look at the driver"
    return "nvidia-smi shows a GPU: see CUDA_VISIBLE_DEVICES, and whether torch is built for this driver's CUDA"


def _requirements() -> Iterator[Finding]:
    """What the project asks for in pyproject.toml, kernels and tools for working on it aside."""
    try:
        lines = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        yield Finding(PROJECT, "missing", "is not installed", f"{installing.command('-e .')} in the project's folder")
        return
    for line in lines:
        wanted = Requirement(line)
        extra = re.search(r'extra == "(\w+)"', str(wanted.marker))
        part = extra[1] if extra else ""
        if part not in ("gpu", "dev") and wanted.name != PROJECT:
            yield _requirement(wanted, part)


def _requirement(wanted: Requirement, extra: str) -> Finding:
    purpose = f" (of '{PROJECT}[{extra}]')" if extra else ""
    absent: Literal["optional", "missing"] = "optional" if extra else "missing"
    install = installing.command(f"'{wanted.name}{wanted.specifier}'")
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding(wanted.name, absent, f"is not installed{purpose}", install)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, absent, f"is {version}, not {wanted.specifier}{purpose}", install)
    return Finding(wanted.name, "ok", version + purpose)


def _kernels(here: kernels.Machine) -> Iterator[Finding]:
    """The packages with CUDA kernels, and what model.kernels=auto makes of them."""
    for package in kernels.PACKAGES:
        problem, version = here.problems[package.name], here.versions[package.name]
        if not problem:
            yield Finding(package.name, "ok", f"{version}: {package.gives}")
        else:
            # Without a GPU they would be of no use.
            install = package.install if here.gpu else ""
            yield Finding(package.name, "optional", f"{problem}: {package.gives}", install)
    if here.gpu and not shutil.which("nvcc") and here.lacks(*kernels.PACKAGES):
        yield Finding("nvcc", "optional", "CUDA's compiler is not on the path; the packages above are built with it")
    chosen = kernels.choose("auto", here)
    for what, reason in zip(("layers", "Mamba mixers", "gated delta nets"), chosen.reasons, strict=True):
        yield Finding(what, "ok", f"model.kernels=auto takes {reason}")


def _tools() -> Iterator[Finding]:
    """What sends and wraps runs: the program, and whether what it talks to answers."""
    for name, purpose, question in (
        ("sbatch", "--executor slurm", ["sinfo", "--noheader", "--format=%P"]),
        ("docker", "--executor docker", ["docker", "info", "--format={{.ServerVersion}}"]),
    ):
        if shutil.which(name) is None:
            yield Finding(name, "optional", f"is not on the path ({purpose}, from a machine that has it)")
            continue
        answer = _ask(question)
        if answer is None:
            yield Finding(name, "optional", f"is here, but nothing answers `{' '.join(question[:2])}` ({purpose})")
        else:
            yield Finding(name, "ok", f"answers: {answer} ({purpose})")


def _ask(command: list[str]) -> str | None:
    """What a command prints, on one line; None if it fails, or says nothing for ten seconds."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return " ".join(asked.stdout.split())

"""Which kernels a model takes on which machine, and what is said where they are missing."""

from pathlib import Path
from typing import Any

import pytest

from hybrid.errors import ConfigError
from hybrid.model import kernels
from hybrid.model.kernels import CAUSAL_CONV1D, FLA, MAMBA_SSM, PACKAGES, TRANSFORMER_ENGINE, Machine
from tests import toy


def machine(gpu: str | None = "NVIDIA H200", capability: tuple[int, int] = (9, 0), **problems: str) -> Machine:
    """A machine on which all packages work, but for those with a problem."""
    named = {package.name: problems.get(package.name.replace("-", "_"), "") for package in PACKAGES}
    return Machine(gpu, capability, dict.fromkeys(named, "9.9"), named)


def test_auto_takes_what_is_there_and_says_why_not_the_rest() -> None:
    everything = kernels.choose("auto", machine())
    assert everything.transformer_engine and everything.mamba
    without_engine = kernels.choose("auto", machine(transformer_engine="is 2.1, older than 2.9"))
    assert (without_engine.transformer_engine, without_engine.mamba) == (False, True)
    assert without_engine.reasons[0] == "torch modules: transformer-engine is 2.1, older than 2.9"
    without_convolution = kernels.choose("auto", machine(causal_conv1d="is not installed"))
    assert (without_convolution.transformer_engine, without_convolution.mamba) == (True, False)
    assert without_convolution.reasons[1] == "PyTorch reference: causal-conv1d is not installed"


def test_reference_and_a_machine_without_a_gpu_take_none() -> None:
    for choice in (kernels.choose("reference", machine()), kernels.choose("auto", machine(gpu=None))):
        assert not choice.transformer_engine and not choice.mamba
    assert kernels.choose("reference", machine()).reasons[0] == "torch modules: model.kernels is 'reference'"
    assert kernels.choose("auto", machine(gpu=None)).reasons[1] == "PyTorch reference: there is no CUDA device"


@pytest.mark.parametrize(
    ("sections", "here", "place", "says"),
    [
        (
            {"model": {"kernels": "fused"}},
            machine(mamba_ssm="is not installed"),
            "model.kernels",
            f"is 'fused', but mamba-ssm is not installed; {MAMBA_SSM.install}",
        ),
        (
            {"model": {"kernels": "fused"}},
            machine(causal_conv1d="is 1.2, older than 1.5"),
            "model.kernels",
            f"is 'fused', but causal-conv1d is 1.2, older than 1.5; {CAUSAL_CONV1D.install}",
        ),
        (
            {"model": {"kernels": "fused", "layer_pattern": "G"}},
            machine(fla_core="is 0.6.0, not below 0.6"),
            "model.kernels",
            f"is 'fused', but fla-core is 0.6.0, not below 0.6; {FLA.install}",
        ),
        (
            {"model": {"layer_pattern": "G"}, "data": {"source": "sft"}},
            machine(fla_core="is not installed"),
            "data.source",
            f"on CUDA ({FLA.install}); here they are PyTorch, for fla-core is not installed",
        ),
        ({"model": {"kernels": "fused"}}, machine(gpu=None), "model.kernels", "there is no CUDA device; set it to"),
        (
            {"trainer": {"precision": "fp8_delayed"}},
            machine(transformer_engine="is not installed"),
            "trainer.precision",
            f"{TRANSFORMER_ENGINE.install}, or set it to 'bf16'",
        ),
        (
            {"trainer": {"precision": "fp8_current"}},
            machine(gpu="NVIDIA A100", capability=(8, 0)),
            "trainer.precision",
            "which the GPU (NVIDIA A100) cannot do; set it to 'bf16'",
        ),
        (
            {"optimizer": {"precision_aware": True}},
            machine(gpu=None),
            "optimizer.precision_aware",
            "needs a CUDA device, and there is none; set it to False",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_way_out(
    tmp_path: Path, sections: dict[str, dict[str, Any]], here: Machine, place: str, says: str
) -> None:
    assert kernels.check(toy.settings(tmp_path, **sections), machine()) == []
    (problem,) = kernels.check(toy.settings(tmp_path, **sections), here)
    assert problem.place == place and says in problem.message


def test_a_package_that_no_layer_needs_is_not_asked_for(tmp_path: Path) -> None:
    wanted = toy.settings(tmp_path, model={"kernels": "fused"})
    assert kernels.check(wanted, machine(fla_core="is not installed")) == []


def test_all_that_is_missing_comes_at_once(tmp_path: Path) -> None:
    wanted = toy.settings(
        tmp_path, model={"kernels": "fused", "layer_pattern": "MG"}, optimizer={"precision_aware": True}
    )
    nothing = machine(**{package.name.replace("-", "_"): "is not installed" for package in PACKAGES})
    assert len(kernels.check(wanted, nothing)) == 5


@pytest.mark.skipif("kernels.machine().gpu is not None")
def test_a_run_that_asks_for_what_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.kernels: is 'fused', but there is no CUDA device"):
        kernels.require(toy.settings(tmp_path, model={"kernels": "fused"}))

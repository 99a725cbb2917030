"""Mamba layers of this project against mamba-ssm's own modules and transformers' models, with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid.quiet  # noqa: F401
from hybrid.model.packing import Packed
from tests import toy
from tests.gpu.runs import SIZES
from tests.hybrid.model.test_mamba1 import test_logits_and_gradients_are_those_of_transformers as test_mamba1_models
from tests.hybrid.model.test_mamba2 import test_logits_and_gradients_are_those_of_transformers as test_mamba2_models

LATENT = {
    "mla_query_rank": 64,
    "mla_kv_rank": 64,
    "mla_head_dim": 24,
    "mla_rope_head_dim": 8,
    "mla_value_head_dim": 32,
    "dsa_index_heads": 16,
    "dsa_index_head_dim": 16,
}
DELTA = {
    "activation": "swiglu",
    "gdn_num_key_heads": 4,
    "gdn_num_value_heads": 8,
    "gdn_key_head_dim": 32,
    "gdn_value_head_dim": 32,
}

pytestmark = pytest.mark.gpu
__all__ = ["test_mamba1_models", "test_mamba2_models"]


def _model(tmp_path: Path, precision: str = "fp32", **sizes: Any) -> tuple[Any, Any]:
    from hybrid.costs.pipeline import stage_pattern
    from hybrid.model.build import build_model, transformer_config

    settings = toy.settings(tmp_path, model={**SIZES, "init_std": 0.1, **sizes}, trainer={"precision": precision})
    pattern = stage_pattern(settings)
    return settings.model, build_model(settings, transformer_config(settings, pattern), pattern)


@pytest.mark.parametrize("version", [1, 2])
def test_a_layer_is_mamba_ssms_module(tmp_path: Path, alone: None, version: int) -> None:
    size, model = _model(tmp_path, layer_pattern="M", mamba_version=version)
    mixer = model.decoder.layers[0].mixer
    theirs = _their_module(version, size)
    # The first linear of transformer-engine holds the norm of its input, which theirs is without.
    state = {
        name.replace("conv1d_", "conv1d."): value
        for name, value in mixer.state_dict().items()
        if value is not None and "layer_norm" not in name and "extra_state" not in name
    }
    theirs.load_state_dict(state)
    hidden = torch.randn(100, 2, size.hidden_size, device="cuda")
    normed = torch.nn.functional.rms_norm(hidden, (size.hidden_size,), eps=size.norm_epsilon)
    expected = theirs(normed.transpose(0, 1).contiguous()).transpose(0, 1)
    torch.testing.assert_close(mixer(hidden)[0], expected, atol=1e-4, rtol=1e-4)


def _their_module(version: int, size: Any) -> Any:
    from mamba_ssm.modules.mamba2 import Mamba2
    from mamba_ssm.modules.mamba_simple import Mamba

    if version == 1:
        return Mamba(
            size.hidden_size, d_state=size.mamba_state_dim, d_conv=4, expand=2, dt_rank=size.dt_rank, device="cuda"
        )
    return Mamba2(
        size.hidden_size,
        d_state=size.mamba_state_dim,
        headdim=size.mamba_head_dim,
        ngroups=size.mamba_num_groups,
        chunk_size=size.mamba_chunk_size,
        norm_before_gate=False,
        device="cuda",
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused_and_reference_are_one_model(tmp_path: Path, alone: None, version: int, precision: str) -> None:
    """Logits and gradients of a small hybrid: transformer-engine and kernels against torch modules."""
    tokens = torch.randint(257, (2, 100), device="cuda")
    _compare(tmp_path, precision, tokens, torch.arange(100, device="cuda").expand(2, -1), mamba_version=version)


@pytest.mark.parametrize("version", [1, 2])
def test_fused_and_reference_keep_packed_sequences_apart(tmp_path: Path, alone: None, version: int) -> None:
    """Three sequences in a row of 100 positions."""
    lengths = [37, 5, 58]
    positions = torch.cat([torch.arange(length) for length in lengths]).cuda().unsqueeze(0)
    packed = Packed.of(lengths, "cuda")
    tokens = torch.randint(257, (1, 100), device="cuda")
    _compare(tmp_path, "bf16", tokens, positions, packed, mamba_version=version)


@pytest.mark.parametrize(("pattern", "precision"), [("+-+", "fp32"), ("+-+", "bf16"), ("D-D", "fp32")])
def test_latent_attention_of_either_backend_is_one_model(
    tmp_path: Path, alone: None, pattern: str, precision: str
) -> None:
    """The indexer may choose every position, so that none hangs on the last bits of a score."""
    tokens, positions = torch.randint(257, (2, 100), device="cuda"), torch.arange(100, device="cuda").expand(2, -1)
    _compare(tmp_path, precision, tokens, positions, layer_pattern=pattern, **LATENT)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gated_delta_net_of_either_kernel_is_one_model(tmp_path: Path, alone: None, precision: str) -> None:
    pytest.importorskip("fla.modules.convolution", reason="fla-core below 0.6 is not here")
    tokens, positions = torch.randint(257, (2, 100), device="cuda"), torch.arange(100, device="cuda").expand(2, -1)
    _compare(tmp_path, precision, tokens, positions, layer_pattern="G-G", **DELTA)


def _compare(
    folder: Path, precision: str, tokens: torch.Tensor, positions: torch.Tensor, packed: Any = None, **sizes: Any
) -> None:
    _, fused = _model(folder, precision, **sizes)
    _, reference = _model(folder, precision, kernels="reference", **sizes)
    _copy_weights(fused, reference)
    results = [model(tokens, positions, None, packed_seq_params=packed) for model in (fused, reference)]
    weights = torch.randn_like(results[0])
    for result in results:
        (result * weights).sum().backward()
    # float32: sums of hundreds of terms in another order. bf16 rounds to 8 bits, some ten products in a row.
    limit = 1e-4 if precision == "fp32" else 4e-2
    gradients = [dict(_tensors(model, "grad")) for model in (fused, reference)]
    apart = {key: _apart(gradients[0][key], gradients[1][key]) for key in gradients[0]}
    print(precision, sizes, _apart(*results), max(apart.items(), key=lambda entry: entry[1]))
    assert _apart(*results) < limit
    assert max(apart.values()) < 5 * limit, apart


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).double().norm() / other.double().norm())


def _tensors(model: Any, what: str) -> list[tuple[str, torch.Tensor]]:
    """Parameters or their gradients by the name they have in a checkpoint."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    parameters = dict(model.named_parameters())
    found = []
    for name, entry in model.sharded_state_dict(metadata={"dp_cp_group": group}).items():
        if name in parameters:
            tensor = parameters[name].grad if what == "grad" else parameters[name].data
            found.append((entry.key, tensor))
    return found


def _copy_weights(source: Any, target: Any) -> None:
    values = dict(_tensors(source, "data"))
    names = _tensors(target, "data")
    assert {key for key, _ in names} == set(values)
    for key, tensor in names:
        tensor.copy_(values[key])

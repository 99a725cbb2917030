import ast
import importlib.util
import sys
import types
from pathlib import Path

import pytest

from hybrid.costs import flops
from hybrid.pattern import parse


def upstream(settings, batch: int) -> float:
    """megatron-core's `num_floating_point_operations`, taken out of its file, which needs a compiler to be imported.

    Only the layer counts that it asks for come from here.
    """
    spec = importlib.util.find_spec("megatron")
    assert spec and spec.submodule_search_locations
    source = next(
        path for folder in spec.submodule_search_locations if (path := Path(folder) / "training/training.py").exists()
    ).read_text()
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "num_floating_point_operations"
    )
    scope = {"is_hybrid_model": lambda _: True}
    exec(compile(ast.Module([function], []), "training.py", "exec"), scope)
    model, pattern = settings.model, settings.model.pattern
    allocation = types.ModuleType("megatron.core.models.hybrid.hybrid_layer_allocation")
    allocation.Symbols = types.SimpleNamespace(MAMBA="M", GDN="G", ATTENTION="*", MLP="-", MOE="E")  # type: ignore[attr-defined]
    allocation.get_hybrid_layer_counts = lambda text: parse(text).counts()  # type: ignore[attr-defined]
    arguments = types.SimpleNamespace(
        hybrid_layer_pattern=pattern.text,
        mtp_num_layers=pattern.mtp_depths,
        seq_length=settings.data.sequence_length,
        hidden_size=model.hidden_size,
        mamba_state_dim=model.mamba_state_dim,
        mamba_head_dim=model.mamba_head_dim,
        mamba_num_groups=model.mamba_num_groups,
        mamba_num_heads=model.mamba_heads,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=True,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        swiglu=model.activation == "swiglu",
        moe_latent_size=None,
        moe_ffn_hidden_size=model.moe_ffn_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_size,
        moe_router_topk=model.moe_top_k,
        linear_key_head_dim=None,
        linear_value_head_dim=None,
        linear_num_key_heads=None,
        linear_num_value_heads=None,
        linear_conv_kernel_dim=None,
        padded_vocab_size=model.padded_vocab_size,
    )
    names = ["megatron", "megatron.core", "megatron.core.models", "megatron.core.models.hybrid"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, allocation.__name__, allocation)
        return scope["num_floating_point_operations"](arguments, batch)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hybrid_8b", {}),
        ("hybrid_800m", {"model__activation": "swiglu"}),
        ("mamba2_8b", {"data__sequence_length": 8192}),
        ("transformer_8b", {"model__attention_head_dim": 64}),
        ("small_moe", {"model__moe_shared_expert_size": 256}),
        ("small_moe", {"model__layer_pattern": "M*E-/ME/ME"}),
    ],
)
def test_equal_to_upstream_where_the_inner_width_is_twice_the_hidden_size(settings_of, name, changes):
    settings = settings_of(name, **changes)
    counted = flops.per_token(settings)
    # Upstream leaves these two out.
    beyond = counted.parts.get("router", 0.0) + counted.parts.get("MTP projection", 0.0)
    expected = upstream(settings, batch=2) / (2 * settings.data.sequence_length)
    assert counted.total - 3 * beyond == pytest.approx(expected, rel=1e-12)


def test_a_gated_delta_net_is_upstreams_without_its_convolution(settings_of):
    settings = settings_of("small", model__layer_pattern="M*-G", model__activation="swiglu")
    convolution = 3 * 2 * 4 * (2 * 16 * 128 + 32 * 128)  # width 4, queries and keys, values; forward and backward
    expected = upstream(settings, batch=2) / (2 * settings.data.sequence_length)
    assert flops.per_token(settings).total + convolution == pytest.approx(expected, rel=1e-12)


def test_sparse_attention_scores_all_positions_and_attends_to_few(settings_of):
    model = settings_of("small", model__layer_pattern="D").model
    index, latent = 64 * 128, model.num_attention_heads * 2 * (2 * 512 + 64)
    assert flops.core(model, "D", 1000) == 1000 * index + 500 * latent  # all may be chosen: half of them are earlier
    # Of 8192 positions the first 2048 see 1024 on average, the others 2048.
    assert flops.core(model, "D", 8192) == 8192 * index + (2048 * 1024 + 6144 * 2048) / 8192 * latent


def test_the_inner_width_is_heads_times_head_width(settings_of):
    """Nemotron-H 56B has 256 heads of 64 on 8192; with 128 of them its Mamba layers cost about half."""
    full = flops.layer(settings_of("nemotron_h_56b").model, "M", 8192)
    half = flops.layer(settings_of("nemotron_h_56b", model__mamba_num_heads=128).model, "M", 8192)
    assert 0.5 < half / full < 0.55


@pytest.mark.parametrize(
    ("name", "total"), [("hybrid_8b", 4.656e10), ("mamba2_8b", 4.434e10), ("hybrid_800m", 4.078e9)]
)
def test_known_totals(settings_of, name, total):
    assert flops.per_token(settings_of(name)).total == pytest.approx(total, rel=1e-3)


def test_mamba1_counts_its_four_projections_and_the_scan(settings_of):
    model = settings_of("mamba_8b").model
    weights = 4096 * 16384 + 8192 * (256 + 256) + 256 * 8192 + 8192 * 4096
    assert flops.layer(model, "M", 4096) == 2 * weights + 9 * 8192 * 128

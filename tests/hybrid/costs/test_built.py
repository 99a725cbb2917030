"""`hybrid.costs` against the modules that megatron-core builds, on the meta device, as one rank of a large world."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from hybrid.config import ParallelConfig
from hybrid.costs import flops, parameters, speed
from hybrid.costs.pipeline import stage_pattern
from hybrid.model import build, cpu
from recipes import registry
from recipes.settle import settings as settle


class OnMeta(TorchFunctionMode):
    """Every tensor that names a device is made on meta: no memory, no work."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)


class Rank:
    """One rank of a world whose other ranks are not there: collectives return at once."""

    def __init__(self, settings, world, rank):
        self.settings, self.world, self.rank = settings, world, rank
        self.pattern = stage_pattern(settings)
        self.virtual = len(self.pattern.segments) // settings.parallel.pipeline

    def __enter__(self):
        cpu.enable()
        parallel = self.settings.parallel
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.world)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual if self.virtual > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        return self

    def __exit__(self, *_):
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()

    @property
    def stage(self):
        return parallel_state.get_pipeline_model_parallel_rank()

    def chunks(self):
        config = build.transformer_config(self.settings, self.pattern)
        for stage in range(self.virtual) if self.virtual > 1 else [None]:
            yield build.build_model(
                self.settings,
                config,
                self.pattern,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
            )

    def parameters(self):
        with OnMeta(), torch.device("meta"):
            return sum(parameter.numel() for chunk in self.chunks() for parameter in chunk.parameters())


LATENT = {
    "model__mla_query_rank": 96,
    "model__mla_kv_rank": 64,
    "model__mla_head_dim": 24,
    "model__activation": "swiglu",
}
SPLIT = {"parallel__tensor": 2, "parallel__sequence": True}
VARIANT = {
    "model__activation": "swiglu",
    "model__normalization": "LayerNorm",
    "model__add_linear_bias": True,
    "model__position_embedding": "learned",
}


@pytest.mark.parametrize(
    ("name", "changes", "world", "ranks"),
    [
        ("hybrid_800m", {}, 1, [0]),
        ("hybrid_8b", {"parallel__tensor": 4}, 4, [3]),
        ("transformer_8b", {"parallel__tensor": 2, "parallel__pipeline": 2}, 4, [0, 3]),
        ("small", VARIANT, 1, [0]),
        ("small", {**VARIANT, "model__tie_embeddings": True}, 1, [0]),
        ("small", {**VARIANT, "parallel__tensor": 4, "parallel__pipeline": 2}, 16, [0, 15]),
        ("small", {**VARIANT, "model__tie_embeddings": True, "parallel__pipeline": 2}, 2, [0, 1]),
        ("small", {"model__layer_pattern": "M|*|-M|-*", "parallel__pipeline": 2}, 2, [0, 1]),
        ("small", {"model__mamba_version": 1, "parallel__tensor": 2, "parallel__pipeline": 2}, 4, [0, 3]),
        ("small", {"model__layer_pattern": "M*-/M*/M*", "parallel__tensor": 2}, 2, [0]),
        ("small", {"model__layer_pattern": "M*|-/M*/M*", "parallel__tensor": 2, "parallel__pipeline": 2}, 4, [0, 3]),
        ("small", {**LATENT, "model__layer_pattern": "M+-G"}, 1, [0]),
        ("small", {**LATENT, **SPLIT, "model__layer_pattern": "M+-G/+G", "model__add_linear_bias": True}, 2, [1]),
        ("small", {**LATENT, **SPLIT, "model__layer_pattern": "+D|G-", "parallel__pipeline": 2}, 4, [0, 3]),
        ("small", {**LATENT, "model__layer_pattern": "D+G", "model__normalization": "LayerNorm"}, 1, [0]),
        ("small_moe", {"parallel__tensor": 2, "parallel__sequence": True}, 2, [1]),
        ("small_moe", {"parallel__expert": 4, "model__moe_shared_expert_size": 96}, 4, [0, 3]),
        ("small_moe", {"model__activation": "swiglu", "parallel__expert": 2, "parallel__pipeline": 2}, 4, [0, 3]),
    ],
)
def test_a_rank_holds_the_parameters_that_are_planned(settings_of, name, changes, world, ranks):
    settings = settings_of(name, **changes)
    for rank in ranks:
        with Rank(settings, world, rank) as built:
            assert built.parameters() == parameters.rank(settings, built.pattern, built.stage).total


@pytest.mark.parametrize("name", registry.entries())
def test_every_recipe_has_the_parameters_that_are_planned(name):
    """The whole model, and a rank of every pipeline stage of the layout that the recipe is meant for."""
    entry = registry.entries()[name]
    settings = settle(entry.function())
    whole = replace(settings, parallel=ParallelConfig())
    for layout, world in ((whole, 1), (settings, max(entry.gpus, 1))):
        stages = layout.parallel.pipeline
        for stage in range(stages):
            with Rank(layout, world, (stage + 1) * world // stages - 1) as built:
                assert built.stage == stage
                assert built.parameters() == parameters.rank(layout, built.pattern, stage).total


def test_every_distinct_rank_of_56b_on_1024_gpus(settings_of):
    """Ranks differ by their pipeline stage alone: with tensor 8 and data 32, stage p begins at rank 256 p."""
    settings = settings_of("nemotron_h_56b", 8192, parallel__tensor=8, parallel__pipeline=4, parallel__sequence=True)
    for rank in (0, 256, 512, 768 + 255):
        with Rank(settings, 1024, rank) as built:
            assert built.parameters() == parameters.rank(settings, built.pattern, rank // 256).total


def test_operations_equal_those_counted_in_the_reference_model(settings_of):
    """The convention leaves out the convolution and the masked half of attention, and estimates the scan.

    What is left, projections and output layer, is equal to the last operation, and so is the chunked scan to
    `speed.scan_products`.
    """
    settings = settings_of("small", 256, trainer__precision="fp32")
    tokens = 2 * 256
    with Rank(settings, 1, 0) as built, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (chunk,) = built.chunks()
        ids = torch.zeros(2, 256, dtype=torch.long)
        loss = chunk(ids, ids, None, labels=ids)
        forward = counter.get_total_flops()
        loss.sum().backward()
        total = counter.get_total_flops()
        products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    planned = flops.per_token(settings)
    model = settings.model
    convolution = 2 * 2 * model.mamba_conv_kernel * (model.mamba_inner_size + 2 * 4 * model.mamba_state_dim)
    masked_half = 2 * flops.core(model, "*", 256)
    scan = 2 * (speed.scan_products(settings) - flops.core(model, "M", 256))
    assert forward == (planned.forward + convolution + masked_half + scan) * tokens
    layers = sum(built.pattern.layers.count(symbol) * flops.projections(model, symbol) for symbol in "M*-")
    assert products == 3 * (layers + planned.parts["output"]) * tokens
    # The scan's own backward pass takes a little less than twice its forward pass.
    assert total == pytest.approx(3 * forward, rel=0.01)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("small", {"model__layer_pattern": "M-M", "model__mamba_version": 1, "model__mamba_state_dim": 16}),
        ("small", {"model__layer_pattern": "M*-", "model__activation": "swiglu", "model__tie_embeddings": True}),
        ("small", {"model__layer_pattern": "M*-/M*"}),
        ("small", {"model__layer_pattern": "M+G-", **LATENT}),
    ],
)
def test_products_with_weights_equal_those_counted(settings_of, name, changes):
    """Every matrix product with a weight, forward and backward, to the last operation."""
    settings = settings_of(name, 128, trainer__precision="fp32", **changes)
    tokens = 2 * 128
    with Rank(settings, 1, 0) as built, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (chunk,) = built.chunks()
        ids = torch.zeros(2, 128, dtype=torch.long)
        chunk(ids, ids, None, labels=ids).sum().backward()
        counts = counter.get_flop_counts()["Global"]
    planned = flops.per_token(settings)
    model, pattern = settings.model, settings.model.pattern
    weights = sum(count * flops.projections(model, symbol) for symbol, count in pattern.counts().items() if count)
    weights += planned.parts["output"] + planned.parts.get("MTP projection", 0.0)
    assert counts[torch.ops.aten.mm] + counts.get(torch.ops.aten.addmm, 0) == 3 * weights * tokens

import pytest

from hybrid.costs import memory, pipeline
from hybrid.costs.hardware import GIB


def peak(settings, world=1, stage=0):
    return memory.training(settings, pipeline.stage_pattern(settings), stage, world)


@pytest.mark.parametrize(
    ("name", "changes", "measured_gib"),
    [
        # One H200, benchmarks/gpu_training.py (benchmarks/gpu.md)
        ("hybrid_800m", {"trainer__micro_batch_size": 1}, 23.2),
        ("hybrid_800m", {"trainer__micro_batch_size": 4}, 46.7),
        ("hybrid_800m", {"trainer__micro_batch_size": 8}, 78.1),
        ("hybrid_800m", {"trainer__micro_batch_size": 8, "trainer__recompute": "full"}, 49.7),
        ("hybrid_800m", {"trainer__micro_batch_size": 8, "trainer__precision": "fp8_current"}, 73.1),
        ("hybrid_8b", {"optimizer__precision_aware": True}, 102.5),
        ("hybrid_8b", {"optimizer__precision_aware": True, "trainer__precision": "fp8_current"}, 111.4),
    ],
)
def test_within_5_percent_of_the_measured_peak(settings_of, name, changes, measured_gib):
    assert peak(settings_of(name, **changes)).total / GIB == pytest.approx(measured_gib, rel=0.05)


def test_weights_gradients_and_state_of_each_optimizer(settings_of):
    """bf16 weights, fp32 gradients, fp32 copy and moments: 18 bytes; 10 precision-aware; 16 in fp32."""
    for changes, each in (
        ({}, 18),
        ({"optimizer__precision_aware": True}, 10),
        ({"trainer__precision": "fp32"}, 16),
    ):
        held = peak(settings_of("hybrid_800m", **changes))
        assert held.weights + held.gradients + held.optimizer == each * 907_127_680


def test_the_distributed_optimizer_divides_only_its_state(settings_of):
    one, eight = (peak(settings_of("hybrid_800m"), world) for world in (1, 8))
    assert eight.optimizer == one.optimizer / 8
    assert (eight.weights, eight.gradients) == (one.weights, one.gradients)
    whole = peak(settings_of("hybrid_800m", parallel__distributed_optimizer=False), 8)
    assert whole.optimizer == one.optimizer


def test_sequence_parallelism_divides_what_tensor_parallelism_leaves_whole(settings_of):
    settings = settings_of("hybrid_8b", parallel__tensor=4)
    without = peak(settings, 4).activations
    settings.parallel.sequence = True
    whole = peak(settings_of("hybrid_8b")).activations
    assert whole / 4 == pytest.approx(peak(settings, 4).activations)
    assert without > whole / 4


def test_recomputation_keeps_less(settings_of):
    kept = [
        sum(memory.saved(settings_of("hybrid_8b", trainer__recompute=recompute), symbol) for symbol in "M*-")
        for recompute in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > kept[2] == 3 * 4096 * 2


def test_early_stages_hold_more_micro_batches(settings_of):
    settings = settings_of("hybrid_8b", parallel__pipeline=4, trainer__global_batch_size=16)
    pattern = pipeline.stage_pattern(settings)
    assert [pipeline.in_flight(pattern, 4, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert peak(settings, 4, stage=0).activations > peak(settings, 4, stage=2).activations


def test_a_run_that_fills_the_memory_does_not_fit(settings_of):
    held = peak(settings_of("hybrid_800m", trainer__micro_batch_size=8))
    assert held.fits(139 * GIB)
    assert not held.fits(held.total)


def test_mamba1_keeps_what_its_mixer_saves(settings_of, monkeypatch):
    """What `mamba1_fused.mix` saves for the backward pass, on the meta device; its kernels give shapes alone."""
    import sys
    import types

    import torch

    settings = settings_of("mamba_8b_n16", model__hidden_size=64)
    model = settings.model
    d, state, batch, length = model.mamba_inner_size, model.mamba_state_dim, 2, 4096

    def scan(u, delta, *_):
        states = torch.empty(batch, d, length // memory.SCAN_CHUNK, 2 * state, dtype=torch.float32, device="meta")
        return torch.empty_like(u), states, torch.empty_like(u)

    stubs = {
        "causal_conv1d": {},
        "causal_conv1d.cpp_functions": {
            "causal_conv1d_fwd_function": lambda x, *_: torch.empty_like(x),
            "causal_conv1d_bwd_function": None,
        },
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_cuda": types.SimpleNamespace(fwd=scan)},
        "hybrid.model.transpose": {
            "channels_first": lambda x: x.permute(1, 2, 0).contiguous(),
            "positions_first": lambda x: x.permute(2, 0, 1).contiguous(),
        },
    }
    for name, content in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hybrid.model.mamba1_fused", raising=False)
    from hybrid.model.mamba1_fused import mix

    with torch.device("meta"):
        wide = {"dtype": torch.bfloat16, "requires_grad": True}
        weights = [torch.empty(d, 4, **wide), torch.empty(d, **wide), torch.empty(model.dt_rank + 2 * state, d, **wide)]
        weights += [torch.empty(d, model.dt_rank, **wide), torch.empty(d), torch.empty(d, state), torch.empty(d)]
        xz = torch.empty(length, batch, 2 * d, **wide)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = mix(xz, *weights, types.SimpleNamespace(size=lambda: 1))
    monkeypatch.delitem(sys.modules, "hybrid.model.mamba1_fused")
    parameters = {id(weight) for weight in weights}
    # Beside them the input projection keeps the residual stream and its norm, the output projection its input y.
    nbytes = sum(tensor.nbytes for tensor in kept if id(tensor) not in parameters) + y.nbytes
    assert memory.saved(settings, "M") == nbytes / (batch * length) + 2 * 2 * model.hidden_size


def test_state_and_cache_of_generation(settings_of):
    """52.3 MB of SSM state a sequence and 16 KiB of keys and values a token for the 8B hybrid."""
    held = memory.inference(settings_of("hybrid_8b"))
    assert held.state_per_sequence == 24 * (8192 * 128 + (8192 + 2 * 8 * 128) * 4) * 2
    assert held.cache_per_token == 4 * 2 * 8 * 128 * 2
    assert held.weights == 2 * 8_654_517_248

import pytest

from hybrid.costs import memory, pipeline
from hybrid.costs.hardware import GIB


def peak(settings, world=1, stage=0):
    return memory.training(settings, pipeline.stage_pattern(settings), stage, world)


@pytest.mark.parametrize(
    ("name", "changes", "measured_gib"),
    [
        # One H200, benchmarks/gpu_training.py (docs/plan.md)
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


def test_state_and_cache_of_generation(settings_of):
    """52.3 MB of SSM state a sequence and 16 KiB of keys and values a token for the 8B hybrid."""
    held = memory.inference(settings_of("hybrid_8b"))
    assert held.state_per_sequence == 24 * (8192 * 128 + (8192 + 2 * 8 * 128) * 4) * 2
    assert held.cache_per_token == 4 * 2 * 8 * 128 * 2
    assert held.weights == 2 * 8_654_517_248

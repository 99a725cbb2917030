import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hybrid.checks import check
from hybrid.costs import communication, hardware, pipeline, speed
from hybrid.costs.plan import plan
from hybrid.costs.search import search
from hybrid.errors import ConfigError
from hybrid.pattern import parse


@pytest.mark.parametrize(
    ("name", "micro_batch", "micro_batches", "changes", "tokens_per_second"),
    [
        # One H200, benchmarks/gpu_training.py (benchmarks/gpu.md)
        ("hybrid_800m", 1, 4, {}, 24_850),
        ("hybrid_800m", 4, 2, {}, 85_030),
        ("hybrid_800m", 8, 4, {}, 95_700),
        ("hybrid_800m", 8, 4, {"trainer__recompute": "full"}, 79_200),
        ("hybrid_800m", 8, 4, {"trainer__precision": "fp8_current"}, 100_180),
        ("hybrid_8b", 1, 8, {"optimizer__precision_aware": True}, 11_430),
        ("hybrid_8b", 1, 8, {"optimizer__precision_aware": True, "trainer__precision": "fp8_current"}, 15_120),
    ],
)
def test_step_time_within_10_percent_of_measured(
    settings_of, name, micro_batch, micro_batches, changes, tokens_per_second
):
    batch = {"trainer__micro_batch_size": micro_batch, "trainer__global_batch_size": micro_batch * micro_batches}
    planned = plan(settings_of(name, **changes, **batch), "h200", 1)
    assert planned.tokens_per_second_per_gpu == pytest.approx(tokens_per_second, rel=0.1)


@pytest.mark.parametrize(
    ("state", "tokens", "forward_ms", "both_ms"),
    # One H200, benchmarks/gpu_layers.py (benchmarks/gpu.md): 8B-shaped Mamba-1 layers that fill the GPU.
    [(16, 4 * 4096, 8.05, 27.65), (128, 4096, 7.15, 28.70)],
)
def test_a_mamba1_layer_takes_as_long_as_measured(settings_of, state, tokens, forward_ms, both_ms):
    settings = settings_of("mamba_8b", model__mamba_state_dim=state)
    layer = speed.layer(settings, "M", hardware.GPUS["h200"])
    assert layer.forward * tokens * 1e3 == pytest.approx(forward_ms, rel=0.1)
    assert layer.total * tokens * 1e3 == pytest.approx(both_ms, rel=0.1)


def test_a_plan_adds_up(settings_of):
    settings = settings_of("hybrid_8b", parallel__tensor=4, parallel__sequence=True)
    settings.trainer.micro_batch_size, settings.trainer.global_batch_size = 4, 1024
    planned = plan(settings, "h100", 64)
    assert planned.layout == {"tensor": 4, "pipeline": 1, "virtual": 1, "context": 1, "expert": 1, "data": 16}
    assert planned.micro_batches == 16
    assert sum(planned.step.parts.values()) == pytest.approx(planned.step.seconds)
    assert planned.tokens_per_step == 1024 * 4096
    assert planned.gpu_hours == pytest.approx(100 * planned.step.seconds * 64 / 3600)
    assert 0.2 < planned.mfu < 0.6
    assert planned.fits


def test_a_plan_is_plain_data(settings_of):
    planned = plan(settings_of("small_moe"), "h200")
    told = json.loads(json.dumps(planned.as_dict()))
    assert told["parameters"]["total"] == planned.parameters.total
    assert told["memory"]["total"] == planned.memory.total
    assert told["strip"] == planned.strip


def test_a_stated_mfu_takes_the_place_of_the_prediction(settings_of):
    planned = plan(settings_of("hybrid_8b"), "h100", 8, mfu=0.4)
    assert planned.mfu == pytest.approx(0.4)
    flops_per_step = planned.flops.total * planned.tokens_per_step
    assert planned.step_seconds == pytest.approx(flops_per_step / (0.4 * 989.4e12 * 8))


def test_without_a_number_of_gpus_it_is_the_fewest_that_the_layout_takes(settings_of):
    assert plan(settings_of("hybrid_8b", parallel__tensor=4), "h200").world_size == 4
    assert plan(settings_of("small_moe", parallel__expert=8), "h200").world_size == 8


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, {"gpu": "v100"}, "gpu: 'v100' is unknown; the GPUs with figures are a100, h100, h200, b200"),
        ({}, {"mfu": 1.5}, "mfu: is 1.5"),
        ({}, {"world_size": 0}, "gpus: is 0"),
        ({"trainer__precision": "fp8_current"}, {"gpu": "a100"}, "which a100 cannot do; use 'bf16'"),
        ({"parallel__tensor": 3}, {}, "must be a multiple of parallel.tensor (3)"),
        ({}, {"world_size": 16}, "trainer.global_batch_size"),
    ],
)
def test_what_cannot_be_planned(settings_of, changes, arguments, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(").replace(")", r"\)")):
        plan(settings_of("small", **changes), **arguments)


class TestStages:
    def test_one_stage_dissolves_segments(self, settings_of):
        settings = settings_of("small", model__layer_pattern="M|*-|M/M*")
        assert pipeline.stage_pattern(settings).text == "M*-M/M*"

    def test_the_users_own_segments_stay(self, settings_of):
        settings = settings_of("small", model__layer_pattern="M|*-M-", parallel__pipeline=2)
        assert pipeline.stage_pattern(settings).text == "M|*-M-"

    def test_a_pattern_without_segments_is_balanced_with_the_output_layer(self, settings_of):
        settings = settings_of("hybrid_8b", parallel__pipeline=4)
        pattern = pipeline.stage_pattern(settings)
        seconds = [each.total for each in speed.segments(settings, pattern, hardware.REFERENCE)]
        assert len(pattern.segments) == 4
        # One layer is the grain: no stage is further from the mean than the dearest layer.
        dearest = max(speed.layer(settings, symbol, hardware.REFERENCE).total for symbol in "M*-")
        assert max(seconds) - sum(seconds) / 4 < dearest

    def test_the_bubble_of_equal_stages(self):
        """(P - 1) / (m + P - 1), and the first term over the virtual stages."""
        seconds, waiting = pipeline.bubble([2.0] * 4, micro_batches=8, virtual=1)
        assert seconds == 2.0 * (8 + 3)
        assert waiting == pytest.approx(3 / 11)
        assert pipeline.bubble([2.0] * 4, 8, virtual=2)[0] == 2.0 * (8 + 1.5)

    def test_virtual_stages_hold_parts_of_more_micro_batches(self):
        pattern = parse("M|M|M|M|M|M|M|M")
        assert [pipeline.in_flight(pattern, 4, stage, 16) for stage in range(4)] == [5.5, 4.5, 3.5, 2.5]


class TestCommunication:
    def axes(self, settings, world, stage=0):
        pattern = pipeline.stage_pattern(settings)
        return communication.per_step(settings, pattern, stage, world, hardware.GPUS["h100"])

    def test_one_gpu_sends_nothing(self, settings_of):
        assert self.axes(settings_of("hybrid_800m"), 1) == {}

    def test_data_parallel_sends_gradients_and_weights(self, settings_of):
        """fp32 gradients are scattered, bf16 weights gathered: 6 bytes a parameter, 7/8 of them on 8 ranks."""
        assert self.axes(settings_of("hybrid_800m"), 8)["data"].bytes == 6 * 907_127_680 * 7 / 8

    def test_tensor_parallel_sends_four_times_the_stream_a_layer(self, settings_of):
        settings = settings_of("hybrid_8b", parallel__tensor=4, trainer__global_batch_size=1)
        per_layer = 4 * 4096 * 4096 * 2 * 3 / 4
        assert self.axes(settings, 4)["tensor"].bytes == 57 * per_layer

    def test_pipeline_sends_hidden_states_on_and_gradients_back(self, settings_of):
        settings = settings_of("hybrid_8b", parallel__pipeline=4, trainer__global_batch_size=16)
        assert self.axes(settings, 4, stage=1)["pipeline"].bytes == 16 * 2 * 4096 * 4096 * 2

    def test_across_nodes_is_slower_than_within(self):
        gpu = hardware.GPUS["h100"]
        assert communication.rate(gpu, 1, 8) == 450e9 * 0.8
        assert communication.rate(gpu, 8, 2) == 50e9 * 0.8
        assert communication.rate(gpu, 4, 8) == 2 * 50e9 * 0.8


class TestSearch:
    def test_candidates_fit_are_allowed_and_ranked(self, settings_of):
        settings = settings_of("hybrid_8b", trainer__global_batch_size=256)
        found = search(settings, "h100", 64)
        steps = [candidate.plan.step.seconds for candidate in found.candidates]
        assert steps == sorted(steps) and len(steps) > 3
        assert all(candidate.plan.fits for candidate in found.candidates)
        assert found.candidates[0].reason.startswith("fastest: compute")
        json.dumps(found.as_dict())

    def test_the_overrides_make_the_plan(self, settings_of):
        settings = settings_of("nemotron_h_56b", 8192, trainer__global_batch_size=768)
        best = search(settings, "h100", 1024, limit=1).candidates[0]
        for place, value in best.overrides.items():
            section, _, name = place.partition(".")
            setattr(getattr(settings, section), name, value)
        assert check(settings, 1024) == []
        assert plan(settings, "h100", 1024) == best.plan

    def test_nothing_fits(self, settings_of):
        found = search(settings_of("nemotron_h_56b", 8192), "h100", 8)
        assert found.candidates == () and found.too_large > 0
        assert found.least_memory > hardware.GPUS["h100"].memory

    def test_experts_are_spread(self, settings_of):
        settings = settings_of("small_moe", trainer__global_batch_size=64)
        assert any(candidate.plan.layout["expert"] > 1 for candidate in search(settings, "h100", 8).candidates)


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    st.text("M*-E", min_size=1, max_size=12),
    st.sampled_from(["", "/M", "/*E/*E"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from(["bf16", "fp32", "fp8_delayed"]),
    st.sampled_from(["none", "selective", "full"]),
    st.sampled_from([1, 2]),
)
def test_what_passes_the_checks_can_be_planned(
    settings_of, layers, mtp, tensor, stages, context, precision, recompute, version
):
    settings = settings_of(
        "small",
        256,
        model__layer_pattern=layers + mtp,
        model__num_experts=4 if "E" in layers + mtp else None,
        model__mamba_version=version,
        parallel__tensor=tensor,
        parallel__sequence=tensor > 1,
        parallel__pipeline=stages,
        parallel__context=context,
        trainer__precision=precision,
        trainer__recompute=recompute,
    )
    world = tensor * stages * context * 2
    if not check(settings, world):
        planned = plan(settings, "h100", world)
        assert planned.step.seconds > 0 and planned.memory.total > 0
        json.dumps(planned.as_dict())


def test_planning_imports_neither_torch_nor_megatron():
    code = "import sys, hybrid.costs.search; print({'torch', 'megatron', 'fiddle', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"

import re
import subprocess
import sys
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.checks import check, require
from hybrid.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Settings,
    TrainerConfig,
)
from hybrid.errors import ConfigError


def settings(**changes) -> Settings:
    """Settings that are right, with `changes` such as model__hidden_size=64."""
    made = Settings(
        name="test",
        model=ModelConfig(
            layer_pattern="M-M*-M-M-",
            hidden_size=128,
            num_attention_heads=8,
            num_query_groups=4,
            mamba_head_dim=16,
            mamba_num_groups=4,
            vocab_size=257,
        ),
        parallel=ParallelConfig(),
        data=DataConfig(sequence_length=64),
        optimizer=OptimizerConfig(),
        trainer=TrainerConfig(max_steps=10),
        checkpoint=CheckpointConfig(),
    )
    for place, value in changes.items():
        section, _, name = place.rpartition("__")
        setattr(getattr(made, section) if section else made, name, value)
    return made


def found(problems, place, words):
    return any(problem.place == place and words in problem.message for problem in problems)


def test_right_settings_have_no_problem():
    assert check(settings()) == []
    assert check(settings(), world_size=8) == []
    require(settings(), world_size=4)


@pytest.mark.parametrize(
    ("changes", "world", "place", "words"),
    [
        # Attention
        (
            {"model__num_attention_heads": 6, "parallel__tensor": 4},
            None,
            "model.num_attention_heads",
            "is 6, but must be a multiple of parallel.tensor (4); nearest: 4 or 8; "
            "or set parallel.tensor to 1, 2, 3 or 6",
        ),
        ({"model__num_query_groups": 3}, None, "model.num_attention_heads", "multiple of model.num_query_groups (3)"),
        (
            {"model__num_attention_heads": 12, "model__num_query_groups": 6, "parallel__tensor": 4},
            None,
            "model.num_query_groups",
            "must be a multiple or a divisor of parallel.tensor (4); or set parallel.tensor to 1, 2, 3 or 6",
        ),
        ({"model__hidden_size": 132}, None, "model.hidden_size", "multiple of model.num_attention_heads (8)"),
        (
            {"model__position_embedding": "rope", "model__rotary_percent": 0.2},
            None,
            "model.rotary_percent",
            "rotates 3 of the 16 dimensions",
        ),
        # Mamba-2
        ({"model__mamba_num_groups": 3}, None, "model.mamba_num_heads", "is 16, but must be a multiple of model.mamba"),
        (
            {"model__mamba_num_groups": 2, "parallel__tensor": 4},
            None,
            "model.mamba_num_groups",
            "is 2, but must be a multiple of parallel.tensor (4); nearest: 4; or set parallel.tensor to 1 or 2",
        ),
        ({"model__mamba_head_dim": 48}, None, "model.mamba_head_dim", "does not divide 2 x model.hidden_size (256)"),
        ({"parallel__context": 32}, None, "parallel.context", "Mamba heads of a tensor-parallel rank (16 / 1 = 16)"),
        (
            {"parallel__context": 3, "data__sequence_length": 60},
            None,
            "parallel.context",
            "its groups (4 / 1 = 4); or set parallel.context to 1, 2, 4 or 8",
        ),
        (
            {"model__kernels": "fused", "model__mamba_conv_kernel": 5},
            None,
            "model.mamba_conv_kernel",
            "causal-conv1d takes 2, 3 or 4; nearest: 4",
        ),
        # Mamba-1
        (
            {"model__mamba_version": 1, "model__hidden_size": 36, "parallel__tensor": 4, "parallel__context": 4},
            None,
            "model.mamba_expand",
            "is 72, no multiple of parallel.tensor x parallel.context (4 x 4); or set parallel.tensor to 1, 2, 3 or 6",
        ),
        (
            {"model__mamba_version": 1, "parallel__tensor": 5, "parallel__context": 3, "data__sequence_length": 60},
            None,
            "model.mamba_expand",
            "(5 x 3); or set parallel.tensor to 1, 2, 4 or 8 and parallel.context to 1, 2, 4 or 8",
        ),
        # MLP, MoE, MTP
        ({"model__ffn_hidden_size": 90, "parallel__tensor": 4}, None, "model.ffn_hidden_size", "nearest: 88 or 92"),
        ({"model__layer_pattern": "M*E"}, None, "model.num_experts", "is not set, but the layer pattern has 1 'E'"),
        ({"model__num_experts": 8}, None, "model.num_experts", "the layer pattern has no 'E'"),
        ({"parallel__expert": 2}, None, "parallel.expert", "has no 'E' to split"),
        (
            {"model__layer_pattern": "M*E", "model__num_experts": 6, "parallel__expert": 4},
            None,
            "model.num_experts",
            "is 6, but must be a multiple of parallel.expert (4); nearest: 4 or 8",
        ),
        (
            {"model__layer_pattern": "M*E", "model__num_experts": 2, "model__moe_top_k": 3},
            None,
            "model.moe_top_k",
            "is 3, more than model.num_experts (2)",
        ),
        (
            {"model__layer_pattern": "M*E", "model__num_experts": 4, "model__moe_top_k": 1},
            None,
            "model.moe_top_k",
            "softmax over one expert",
        ),
        (
            {"model__layer_pattern": "M*E", "model__num_experts": 4, "parallel__tensor": 2},
            None,
            "parallel.sequence",
            "only with sequence parallelism",
        ),
        (
            {
                "model__layer_pattern": "M*E",
                "model__num_experts": 4,
                "model__moe_shared_expert_size": 64,
                "model__add_linear_bias": True,
            },
            None,
            "model.add_linear_bias",
            "shared experts have no biases",
        ),
        (
            {"model__layer_pattern": "M*/M", "model__position_embedding": "learned"},
            None,
            "model.position_embedding",
            "which MTP layers do not take",
        ),
        (
            {"model__layer_pattern": "M*/M", "model__tie_embeddings": True, "parallel__pipeline": 2},
            None,
            "model.tie_embeddings",
            "cannot save",
        ),
        # Latent attention, sparse attention, gated delta nets
        (
            {"model__layer_pattern": "M+-D", "parallel__tensor": 2},
            None,
            "parallel.sequence",
            "trains latent attention (MLA), sparse attention (DSA) under tensor parallelism (2) only with sequence",
        ),
        (
            {"model__layer_pattern": "M+", "model__mla_rope_head_dim": 7},
            None,
            "model.mla_rope_head_dim",
            "is 7, but dimensions are rotated in pairs; nearest: 6 or 8",
        ),
        (
            {"model__layer_pattern": "MD", "model__dsa_index_head_dim": 32},
            None,
            "model.dsa_index_head_dim",
            "holds the rotated width, model.mla_rope_head_dim (64); nearest: 64",
        ),
        (
            {"model__layer_pattern": "MD", "model__add_linear_bias": True},
            None,
            "model.add_linear_bias",
            "has no biases",
        ),
        (
            {"model__layer_pattern": "MD", "model__attention_dropout": 0.1},
            None,
            "model.attention_dropout",
            "is 0.1, but sparse attention (D) has no dropout; nearest: 0",
        ),
        ({"model__layer_pattern": "MG"}, None, "model.activation", "has them with SiLU only; nearest: 'swiglu'"),
        (
            {"model__layer_pattern": "G", "model__gdn_num_value_heads": 24},
            None,
            "model.gdn_num_value_heads",
            "is 24, but must be a multiple of model.gdn_num_key_heads (16); nearest: 16 or 32; or set",
        ),
        (
            {"model__layer_pattern": "G", "model__gdn_num_key_heads": 2, "parallel__tensor": 2, "parallel__context": 2},
            None,
            "model.gdn_num_key_heads",
            "is 2, but must be a multiple of parallel.tensor x parallel.context (2 x 2); nearest: 4",
        ),
        (
            {"model__layer_pattern": "M+G", "checkpoint__export": "hf:out"},
            None,
            "checkpoint.export",
            "the converters know no G (gated delta net); set it to None",
        ),
        # Vocabulary
        (
            {"model__vocab_size_multiple": 1, "parallel__tensor": 2},
            None,
            "model.vocab_size_multiple",
            "pads model.vocab_size (257) to 257",
        ),
        ({"model__vocab_size": 256}, None, "model.vocab_size", "byte tokenizer has 257 tokens"),
        # Layout
        ({"parallel__sequence": True}, None, "parallel.sequence", "nothing to split without tensor parallelism"),
        (
            {"parallel__context": 4, "data__sequence_length": 60},
            None,
            "data.sequence_length",
            "is 60, but must be a multiple of 2 x parallel.context (2 x 4); nearest: 56 or 64",
        ),
        (
            {"parallel__tensor": 4, "parallel__sequence": True, "data__sequence_length": 62},
            None,
            "data.sequence_length",
            "nearest: 60 or 64",
        ),
        ({"parallel__overlap_param_gather": True}, None, "parallel.overlap_param_gather", "overlap_grad_reduce=True"),
        (
            {"optimizer__precision_aware": True, "parallel__distributed_optimizer": False},
            None,
            "optimizer.precision_aware",
            "distributed_optimizer=True",
        ),
        ({"parallel__pipeline": 10}, None, "parallel.pipeline", "the pattern has 9 layers"),
        (
            {"model__layer_pattern": "M-|M*|-M", "parallel__pipeline": 2},
            None,
            "model.layer_pattern",
            "has 3 segments, but they must be a multiple of parallel.pipeline (2)",
        ),
        (
            {"model__layer_pattern": "M-|M*|-M|M-", "parallel__pipeline": 2, "trainer__global_batch_size": 6},
            4,
            "trainer.global_batch_size",
            "with virtual stages (4 segments on 2 stages); nearest: 4 or 8",
        ),
        # Processes and batches
        (
            {"parallel__tensor": 2, "parallel__pipeline": 2},
            6,
            "parallel",
            "multiples of tensor x pipeline x context (2 x 2 x 1) = 4, but there are 6; nearest: 4 or 8 processes",
        ),
        (
            {"model__layer_pattern": "M*E", "model__num_experts": 4, "parallel__expert": 4},
            2,
            "parallel.expert",
            "must divide the data parallel x context parallel size (2",
        ),
        ({}, 16, "trainer.global_batch_size", "is 8, but must be a multiple of"),
        ({}, 16, "trainer.global_batch_size", "or use at most 8 processes"),
        ({"trainer__micro_batch_size": 3}, None, "trainer.global_batch_size", "nearest: 6 or 9"),
        # Length of the run
        ({"trainer__max_steps": None}, None, "trainer.max_steps", "is not set, and trainer.max_samples is not either"),
        ({"trainer__max_samples": 80}, None, "trainer.max_steps", "are both set"),
        ({"trainer__max_steps": None, "trainer__max_samples": 5}, None, "trainer.max_samples", "less than one global"),
        ({"optimizer__warmup_samples": 80}, None, "optimizer.warmup_samples", "nearest: 79"),
        ({"optimizer__wsd_decay_samples": 8}, None, "optimizer.wsd_decay_samples", "optimizer.schedule is 'cosine'"),
        ({"trainer__profile": [5, 600]}, None, "trainer.profile", "the run ends at step"),
        ({"trainer__memory_snapshot": 600}, None, "trainer.memory_snapshot", "the run ends at step"),
        (
            {"optimizer__schedule": "wsd", "optimizer__wsd_decay_samples": 90},
            None,
            "optimizer.wsd_decay_samples",
            "there are 80 samples; nearest: 80",
        ),
        ({"optimizer__min_lr": 1.0}, None, "optimizer.min_lr", "above optimizer.lr"),
        # Data and name
        ({"data__source": "text"}, None, "data.path", "is not set"),
        ({"data__path": "/books"}, None, "data.path", "reads no path"),
        ({"data__test_path": "/x"}, None, "data.test_path", "only data.source 'indexed' and 'sft' read it"),
        ({"data__source": "sft"}, None, "data.path", "reads JSONL files of examples"),
        (
            {"data__source": "sft", "data__path": "x", "parallel__context": 2},
            None,
            "parallel.context",
            "set it to 1",
        ),
        ({"trainer__rampup_batch_size": [2, 2]}, None, "trainer.rampup_batch_size", "must be"),
        ({"trainer__rampup_batch_size": [2, 4, 100]}, None, "trainer.rampup_batch_size", "does not lead to"),
        ({"trainer__rampup_batch_size": [2, 2, 100]}, 4, "trainer.rampup_batch_size", "nearest: 4"),
        ({"optimizer__warmup_steps": 10}, None, "optimizer.warmup_steps", "that is 80 samples"),
        ({"optimizer__warmup_steps": 10}, None, "optimizer.warmup_steps", "nearest: 9"),
        ({"optimizer__warmup_tokens": 64 * 80}, None, "optimizer.warmup_tokens", "that is 80 samples"),
        (
            {"optimizer__warmup_tokens": 64, "optimizer__warmup_steps": 1},
            None,
            "optimizer.warmup_steps",
            "are both set",
        ),
        ({"data__split": [1.0, 0.0]}, None, "data.split", "three shares"),
        ({"name": "a/b"}, None, "name", "is 'a/b', but the run's folder is called so: it begins with neither"),
        ({"name": ".a"}, None, "name", "has no slash, backslash or end of line"),
        # Types and ranges
        ({"model__hidden_size": "128"}, None, "model.hidden_size", "is '128', but must be a whole number"),
        ({"trainer__max_steps": 1e3}, None, "trainer.max_steps", "must be a whole number or None"),
        ({"parallel__sequence": 1}, None, "parallel.sequence", "must be True or False"),
        ({"model__activation": "relu"}, None, "model.activation", "one of 'gelu', 'squared_relu', 'swiglu'"),
        ({"data__split": [99, "1", 0]}, None, "data.split", "a list, each entry a number"),
        ({"optimizer__lr": float("nan")}, None, "optimizer.lr", "must be a number"),
        ({"model": None}, None, "model", "must be a ModelConfig"),
        ({"parallel__tensor": 0}, None, "parallel.tensor", "at least 1"),
        ({"optimizer__beta1": 1.0}, None, "optimizer.beta1", "at least 0 and below 1"),
        # The pattern's own
        ({"model__layer_pattern": "M-x"}, None, "model.layer_pattern", "'x' is no layer symbol"),
    ],
)
def test_each_rule_says_the_place_the_numbers_and_the_way_out(changes, world, place, words):
    problems = check(settings(**changes), world)
    assert found(problems, place, words), "\n".join(map(str, problems))


@pytest.mark.parametrize(
    ("changes", "place", "words"),
    [
        ({"model__mamba_num_heads": 17, "model__mamba_num_groups": 1}, "model.mamba_num_heads", "+ heads) / tensor"),
        ({"model__ffn_hidden_size": 40}, "model.ffn_hidden_size", "makes MLP width / tensor 40"),
        ({"data__sequence_length": 24}, "trainer.micro_batch_size", "nearest: 16 or 32"),
        ({"model__layer_pattern": "M+", "model__mla_kv_rank": 24}, "model.mla_kv_rank", "makes key-value rank 24"),
        ({"model__layer_pattern": "MD", "model__dsa_index_heads": 8}, "model.dsa_index_heads", "indexer heads 8"),
        (
            {"model__layer_pattern": "MG", "model__gdn_num_value_heads": 17, "model__gdn_num_key_heads": 17},
            "model.gdn_num_value_heads",
            "delta net's projection / tensor 8738",
        ),
        ({"model__kernels": "reference"}, "model.kernels", "needs transformer-engine"),
    ],
)
def test_fp8_takes_multiples_of_16(changes, place, words):
    assert check(settings(trainer__precision="fp8_current")) == []
    problems = check(settings(trainer__precision="fp8_current", **changes))
    assert found(problems, place, words), "\n".join(map(str, problems))


def test_every_number_has_a_range():
    """A new field without one would let -1 through. The first three are the layer pattern's to judge."""
    judged_elsewhere = {"model.num_layers", "model.attention_ratio", "model.mlp_ratio"}
    judged_elsewhere |= {"data.split", "model.mamba_version", "trainer.profile", "trainer.rampup_batch_size"}
    numbers = {
        f"{section}.{name}"
        for section, config in vars(settings()).items()
        if not isinstance(config, str)
        for name, hint in get_type_hints(type(config)).items()
        if any(kind in str(hint) for kind in ("int", "float"))
    }
    wrong = settings()
    for place in numbers - judged_elsewhere:
        section, name = place.split(".")
        setattr(getattr(wrong, section), name, -1)
    numbers -= judged_elsewhere
    assert {problem.place for problem in check(wrong)} == numbers


def test_all_problems_come_at_once():
    wrong = settings(model__layer_pattern="Mx", parallel__sequence=True, trainer__max_steps=None, data__source="text")
    places = {problem.place for problem in check(wrong)}
    assert places == {"model.layer_pattern", "parallel.sequence", "trainer.max_steps", "data.path"}
    with pytest.raises(ConfigError) as caught:
        require(wrong)
    assert len(caught.value.problems) == 4


def test_rules_that_do_not_depend_on_each_other_do_not_hide_each_other():
    """A missing number of experts, and what else is wrong with them; FP8 says nothing of what ranks cannot share."""
    split = {"parallel__tensor": 2, "model__add_linear_bias": True}
    problems = check(settings(model__layer_pattern="ME", **split))
    assert {it.place for it in problems} == {"model.num_experts", "model.add_linear_bias", "parallel.sequence"}
    problems = check(settings(parallel__tensor=3, trainer__precision="fp8_current"))
    assert problems and not any("FP8" in it.message for it in problems)


def test_segments_without_pipeline_parallelism_are_fine():
    assert check(settings(model__layer_pattern="M-|M*|-M")) == []


def test_a_pattern_without_segments_is_split_for_the_user():
    assert check(settings(parallel__pipeline=4), world_size=4) == []


sizes = st.one_of(st.integers(1, 12), st.sampled_from([16, 24, 30, 64, 4096, 10**9]))


size_fields = [
    *("model__hidden_size", "model__num_attention_heads", "model__num_query_groups", "model__mamba_state_dim"),
    *("model__mamba_head_dim", "model__mamba_num_groups", "model__mamba_expand", "model__moe_ffn_hidden_size"),
    *("model__mla_kv_rank", "model__mla_rope_head_dim", "model__gdn_num_key_heads", "model__gdn_num_value_heads"),
    *("model__moe_top_k", "model__vocab_size_multiple", "trainer__micro_batch_size", "trainer__global_batch_size"),
    *("parallel__tensor", "parallel__pipeline", "parallel__context", "parallel__expert", "data__sequence_length"),
]


@given(
    st.fixed_dictionaries(dict.fromkeys(size_fields, sizes)),
    st.sampled_from(["M-M*", "M*E/M", "MMM", "M|*|-", "E-", "G+D"]),
    st.sampled_from([1, 2]),
    st.sampled_from(["bf16", "fp8_delayed"]),
    st.one_of(st.none(), sizes),
)
def test_no_sizes_make_it_fail_and_the_nearest_value_does(changes, pattern, version, precision, world):
    def made(**more):
        base = {
            "model__layer_pattern": pattern,
            "model__mamba_version": version,
            "model__num_experts": 4 if "E" in pattern else None,
            "trainer__precision": precision,
        }
        return settings(**base, **changes | more)

    for problem in check(made(), world):
        multiple = re.match(r"is (\d+), but must be a multiple of .*?; nearest: (\d+)", problem.message)
        field = problem.place.replace(".", "__")
        if multiple and field in changes:
            mended = check(made(**{field: int(multiple[2])}), world)
            rule = problem.message.split("; nearest")[0].split("but must")[1]
            assert not any(other.place == problem.place and rule in other.message for other in mended)


def test_checking_imports_neither_torch_nor_megatron():
    code = "import sys, hybrid.checks; print({'torch', 'megatron', 'fiddle', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"

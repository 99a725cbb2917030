"""Recipes made of other recipes: fine-tuning one, and a small one of the same shape for a trial run.

Both return a new recipe and leave the given one as it is; on the command line they are written around a name:
`hybrid show 'shrink(hybrid_8b, steps=5)'`.
"""

import copy
from math import lcm
from typing import TYPE_CHECKING, Any

from hybrid import pattern as patterns
from hybrid import run
from hybrid.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from hybrid.pattern import Pattern
from recipes import nodes, parts
from recipes.nodes import config, partial
from recipes.settle import settings

if TYPE_CHECKING:
    import fiddle as fdl


def finetune(recipe: "fdl.Partial[Any]", checkpoint: str | None = None) -> "fdl.Partial[Any]":
    """Return the recipe that fine-tunes the model of `recipe`, from the weights in `checkpoint`.

    Model, layout, tokenizer, sequence length and precision stay; the data are examples (`data.source` "sft"), which the
    user names with `data.path`. Length, batch and schedule are those of full fine-tuning in Megatron-Bridge
    (`recipes/common.py`, `_sft_common`): 1000 steps of 128 samples, learning rate 5e-6, 50 steps of warm-up. A recipe
    that fine-tunes already only gets the checkpoint.
    """
    if recipe.__fn_or_cls__ is run.finetune:
        tuned = copy.deepcopy(recipe)
        tuned.checkpoint.load = checkpoint or tuned.checkpoint.load
        return tuned
    values = copy.deepcopy(recipe).__arguments__
    tuned = partial(run.finetune, **{**values, "name": f"{values['name']}_finetune"})
    tuned.data.source = "sft"
    tuned.data.path = tuned.data.validation_path = tuned.data.test_path = None
    tuned.data.split = [98.0, 2.0, 0.0]
    tuned.optimizer.lr = 5e-6
    tuned.optimizer.min_lr = 0.0
    tuned.optimizer.schedule = "cosine"
    tuned.optimizer.warmup_samples = tuned.optimizer.warmup_tokens = None
    tuned.optimizer.warmup_steps = 50
    tuned.optimizer.decay_samples = None
    tuned.optimizer.wsd_decay_samples = None
    tuned.trainer.max_steps = 1000
    tuned.trainer.max_samples = None
    tuned.trainer.rampup_batch_size = []
    tuned.trainer.micro_batch_size = 1
    tuned.trainer.global_batch_size = 128
    tuned.trainer.eval_interval = 100
    tuned.trainer.eval_steps = 32
    tuned.checkpoint.save_interval = 100
    tuned.checkpoint.load = checkpoint
    return tuned


def shrink(
    recipe: "fdl.Partial[Any]", steps: int = 10, layers: int = 10, hidden_size: int = 64, keep_layout: bool = False
) -> "fdl.Partial[Any]":
    """Return a recipe of the same shape that a laptop trains in seconds, on the CPU and on Python's own library.

    The same layer kinds in the same rhythm, the same variants of each kind, the same ratios between heads, groups and
    widths, so that what a layout or a checkpoint asks of the large model it asks of the small one. At least `layers`
    layers, more if some kind would be missing. `keep_layout` keeps the parallel sizes for as many processes; heads and
    groups are then multiples of the tensor parallel size. Raises ConfigError if `recipe` cannot be settled.
    """
    large = settings(recipe)
    parallel = large.parallel if keep_layout else ParallelConfig()
    tensor = parallel.tensor
    small = copy.deepcopy(recipe)
    small.name = f"{large.name}_small"
    model = small.model
    model.layer_pattern = _shorten(large.model.pattern, layers, parallel.pipeline if keep_layout else 1).text
    model.hidden_size = hidden_size
    model.ffn_hidden_size = _scaled(large.model.ffn_size, hidden_size, large.model.hidden_size, 16 * tensor)
    groups = large.model.query_groups
    model.num_query_groups = groups if groups < tensor else min(groups, max(2, tensor))
    model.num_attention_heads = model.num_query_groups * min(large.model.num_attention_heads // groups, 2)
    while model.num_attention_heads % tensor:
        model.num_attention_heads += model.num_query_groups
    model.attention_head_dim = 16
    model.mamba_state_dim = 16
    model.mamba_head_dim = 16
    model.mamba_num_groups = min(large.model.mamba_num_groups, max(2, tensor))
    unit = lcm(model.mamba_num_groups, tensor * parallel.context)
    inner = _scaled(large.model.mamba_inner_size, hidden_size, large.model.hidden_size, 16 * unit)
    model.mamba_num_heads = inner // 16
    model.mamba_dt_rank = None
    model.mamba_chunk_size = 32
    if large.model.num_experts is not None:
        model.num_experts = max(4, 2 * parallel.expert)
        model.moe_top_k = min(large.model.moe_top_k, 2)
        model.moe_ffn_hidden_size = 32 * tensor
        model.moe_shared_expert_size = 32 * tensor if large.model.moe_shared_expert_size else None
    _shrink_variants(model, large.model, tensor * parallel.context)
    model.vocab_size = 257
    model.vocab_size_multiple = 4 * tensor
    small.data = parts.stdlib(sequence_length=128)
    small.parallel = copy.deepcopy(nodes.value(recipe, "parallel")) if keep_layout else parts.single()
    small.optimizer = config(OptimizerConfig, lr=1e-3, min_lr=1e-4, schedule=large.optimizer.schedule)
    small.trainer = config(
        TrainerConfig,
        max_steps=steps,
        micro_batch_size=1,
        global_batch_size=4,
        precision="fp32",
        recompute=large.trainer.recompute,
        eval_interval=0,
        eval_steps=1,
    )
    small.checkpoint = parts.checkpoints_every(steps)
    small.checkpoint.load = large.checkpoint.load
    return small


def _shrink_variants(model: Any, large: ModelConfig, ranks: int) -> None:
    """Small sizes for latent attention, sparse attention and gated delta nets, where the pattern has them."""
    counts = large.pattern.counts()
    sizes: dict[str, int] = {}
    if counts["+"] or counts["D"]:
        sizes |= {"mla_query_rank": 32, "mla_kv_rank": 16}
        sizes |= {"mla_head_dim": 16, "mla_rope_head_dim": 8, "mla_value_head_dim": 16}
    if counts["D"]:
        sizes |= {"dsa_index_heads": 16, "dsa_index_head_dim": 16, "dsa_top_k": 32}
    if counts["G"]:
        keys, each = max(2, ranks), min(large.gdn_num_value_heads // large.gdn_num_key_heads, 2)
        sizes |= {"gdn_num_key_heads": keys, "gdn_num_value_heads": keys * each}
        sizes |= {"gdn_key_head_dim": 16, "gdn_value_head_dim": 16}
    for name, size in sizes.items():
        setattr(model, name, size)


def _scaled(width: int, small: int, large: int, multiple: int) -> int:
    """`width` in the proportion `small` to `large`, rounded to a multiple, at least one."""
    return max(1, round(width * small / large / multiple)) * multiple


def _shorten(pattern: Pattern, layers: int, stages: int) -> Pattern:
    """The shortest run of `layers` or more layers that has all kinds of the pattern, cut into `stages` segments."""
    whole = pattern.layers
    kinds = set(whole)
    layers = min(len(whole), max(layers, stages))
    while True:
        for start in range(len(whole) - layers + 1):
            window = whole[start : start + layers]
            if set(window) == kinds:
                short = Pattern((window,), pattern.mtp, pattern.mtp_depths)
                return patterns.split(short, stages, dict.fromkeys(kinds, 1.0)) if stages > 1 else short
        layers += 1

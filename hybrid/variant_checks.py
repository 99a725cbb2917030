"""The rules of latent attention (`+`), sparse attention (`D`) and gated delta nets (`G`), for `hybrid.checks`."""

from collections.abc import Iterator

from hybrid.config import Settings
from hybrid.errors import Problem
from hybrid.fields import multiple_of, sizes_that
from hybrid.pattern import LAYER_KINDS, Pattern


def layers(settings: Settings, pattern: Pattern) -> Iterator[Problem]:
    """Rules of these layer kinds, as far as the pattern has them."""
    counts = pattern.counts()
    if counts["+"] or counts["D"]:
        yield from _latent(settings)
    if counts["D"]:
        yield from _sparse(settings)
    if counts["G"]:
        yield from _delta(settings)
    parallel = settings.parallel
    kinds = [LAYER_KINDS[symbol] for symbol in "+DG" if counts[symbol]]
    # Upstream asserts it for D; in the others, gradients of what all ranks share would be those of one rank's heads.
    if kinds and parallel.tensor > 1 and not parallel.sequence:
        yield Problem(
            "parallel.sequence",
            f"is False, but megatron-core trains {', '.join(kinds)} under tensor parallelism ({parallel.tensor}) only "
            "with sequence parallelism; set it to True",
        )


def fp8_whole(settings: Settings, symbol: str) -> dict[str, tuple[str, int]]:
    """Sides of a layer's weights that every rank has whole: what each is, the field that makes it, how wide it is."""
    model = settings.model
    if symbol == "G":
        return {}
    sides = {
        "query rank": ("model.mla_query_rank", model.mla_query_rank),
        "key-value rank": ("model.mla_kv_rank", model.mla_kv_rank),
        "key-value rank + rotated width": ("model.mla_rope_head_dim", model.mla_kv_rank + model.mla_rope_head_dim),
    }
    if symbol == "D":
        sides |= {
            "indexer heads x width": ("model.dsa_index_head_dim", model.dsa_index_heads * model.dsa_index_head_dim),
            "indexer key width": ("model.dsa_index_head_dim", model.dsa_index_head_dim),
            "indexer heads": ("model.dsa_index_heads", model.dsa_index_heads),
        }
    return sides


def fp8_cut(settings: Settings, symbol: str) -> dict[str, tuple[str, int]]:
    """The same for sides that are cut over tensor-parallel ranks."""
    model, heads = settings.model, settings.model.num_attention_heads
    if symbol == "G":
        return {
            "delta net's projection": ("model.gdn_num_value_heads", model.gdn_projected),
            "delta net's values": ("model.gdn_value_head_dim", model.gdn_value_size),
        }
    both = model.mla_head_dim + model.mla_value_head_dim
    return {
        "query heads x width": ("model.mla_head_dim", heads * model.mla_query_head_dim),
        "key-value heads x width": ("model.mla_value_head_dim", heads * both),
        "value heads x width": ("model.mla_value_head_dim", heads * model.mla_value_head_dim),
    }


def _latent(settings: Settings) -> Iterator[Problem]:
    width = settings.model.mla_rope_head_dim
    if width % 2:
        yield Problem(
            "model.mla_rope_head_dim",
            f"is {width}, but dimensions are rotated in pairs; nearest: {f'{width - 1} or ' if width > 1 else ''}"
            f"{width + 1}",
        )


def _sparse(settings: Settings) -> Iterator[Problem]:
    model = settings.model
    if model.dsa_index_head_dim < model.mla_rope_head_dim:
        yield Problem(
            "model.dsa_index_head_dim",
            f"is {model.dsa_index_head_dim}, but holds the rotated width, model.mla_rope_head_dim "
            f"({model.mla_rope_head_dim}); nearest: {model.mla_rope_head_dim}",
        )
    if model.add_linear_bias:
        yield Problem("model.add_linear_bias", "is True, but sparse attention (D) has no biases; nearest: False")
    if model.attention_dropout:
        yield Problem(
            "model.attention_dropout",
            f"is {model.attention_dropout}, but sparse attention (D) has no dropout; nearest: 0",
        )


def _delta(settings: Settings) -> Iterator[Problem]:
    model, parallel = settings.model, settings.parallel
    keys, values, ranks = model.gdn_num_key_heads, model.gdn_num_value_heads, parallel.tensor * parallel.context
    near = sizes_that(lambda size: values % size == 0, keys, "model.gdn_num_key_heads")
    yield from multiple_of("model.gdn_num_value_heads", values, keys, f"model.gdn_num_key_heads ({keys})", near)
    what = f"parallel.tensor x parallel.context ({parallel.tensor} x {parallel.context})"
    yield from multiple_of("model.gdn_num_key_heads", keys, ranks, what)
    yield from multiple_of("model.gdn_num_value_heads", values, ranks, what)
    if model.activation != "swiglu":
        yield Problem(
            "model.activation",
            f"is '{model.activation}', but a gated delta net (G) takes the model's activation for its convolution and "
            "gate, and has them with SiLU only; nearest: 'swiglu'",
        )

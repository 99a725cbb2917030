"""The rules of the model and its layers, for `hybrid.checks`: what each layer kind asks of widths, heads and layout."""

from collections.abc import Iterator
from math import lcm

from hybrid import variant_checks
from hybrid.config import Settings
from hybrid.errors import Problem
from hybrid.fields import multiple_of, sizes_that
from hybrid.pattern import Pattern

# What transformer-engine's FP8 matrix products take on every side (`assert_dim_for_fp8_exec` in its `utils.py`).
FP8_MULTIPLE = 16


def model(settings: Settings) -> Iterator[Problem]:
    """Rules of the model that hold whatever layers it has."""
    model, tensor = settings.model, settings.parallel.tensor
    way_out = sizes_that(lambda size: model.num_attention_heads % size == 0, tensor, "parallel.tensor")
    what = f"parallel.tensor ({tensor})"
    yield from multiple_of("model.num_attention_heads", model.num_attention_heads, tensor, what, way_out)
    groups = model.query_groups
    if groups % tensor and tensor % groups:
        way_out = sizes_that(lambda size: groups % size == 0 or size % groups == 0, tensor, "parallel.tensor")
        yield Problem(
            "model.num_query_groups",
            f"is {groups}, but must be a multiple or a divisor of parallel.tensor ({tensor}){way_out}",
        )
    padded = model.padded_vocab_size
    if padded % tensor:
        yield Problem(
            "model.vocab_size_multiple",
            f"is {model.vocab_size_multiple}, which pads model.vocab_size ({model.vocab_size}) to {padded}, no "
            f"multiple of parallel.tensor ({tensor}); nearest: {lcm(model.vocab_size_multiple, tensor)}",
        )


def layers(settings: Settings, pattern: Pattern) -> Iterator[Problem]:
    """Rules of the layer kinds that the pattern has."""
    model, tensor = settings.model, settings.parallel.tensor
    counts = pattern.counts()
    if counts["*"]:
        yield from _attention(settings)
    if counts["M"]:
        yield from _mamba2(settings) if model.mamba_version == 2 else _mamba1(settings)
    if counts["-"]:
        yield from multiple_of("model.ffn_hidden_size", model.ffn_size, tensor, f"parallel.tensor ({tensor})")
    yield from variant_checks.layers(settings, pattern)
    yield from _experts(settings, counts["E"])
    if pattern.mtp:
        yield from multiple_of("model.hidden_size", model.hidden_size, tensor, f"parallel.tensor ({tensor}) for MTP")
        if model.position_embedding == "learned":
            yield Problem(
                "model.position_embedding", "is 'learned', which MTP layers do not take; nearest: 'rope' or 'none'"
            )
        if pattern.mtp_depths >= settings.data.sequence_length:
            yield Problem(
                "model.layer_pattern",
                f"has {pattern.mtp_depths} MTP depths, which needs samples of more than that many tokens; "
                f"data.sequence_length is {settings.data.sequence_length}",
            )
        if model.tie_embeddings and settings.parallel.pipeline > 1:
            yield Problem(
                "model.tie_embeddings",
                "is True, but megatron-core cannot save a model with MTP and tied embeddings from several pipeline "
                "stages; set it to False, or parallel.pipeline to 1",
            )


def _attention(settings: Settings) -> Iterator[Problem]:
    model, tensor = settings.model, settings.parallel.tensor
    heads, groups = model.num_attention_heads, model.query_groups
    if heads % groups:
        near = sizes_that(lambda size: heads % size == 0, groups, "model.num_query_groups")
        what = f"model.num_query_groups ({groups})"
        yield from multiple_of("model.num_attention_heads", heads, groups, what, near)
    if model.attention_head_dim is None and model.hidden_size % heads:
        way_out = "; or set model.attention_head_dim"
        what = f"model.num_attention_heads ({heads})"
        yield from multiple_of("model.hidden_size", model.hidden_size, heads, what, way_out)
    width = int(model.head_dim * model.rotary_percent)
    if model.position_embedding == "rope" and (width % 2 or not width):
        yield Problem(
            "model.rotary_percent",
            f"is {model.rotary_percent}, which rotates {width} of the {model.head_dim} dimensions of a head, "
            "but they are rotated in pairs",
        )
    if groups < tensor and tensor % groups == 0:
        # The key-value heads are gathered; the projection itself is still cut into equal parts.
        width = (heads + 2 * groups) * model.head_dim
        if width % tensor:
            yield Problem(
                "model.num_query_groups",
                f"is {groups}, which makes a query-key-value projection of {width} rows, no multiple of "
                f"parallel.tensor ({tensor}); nearest: {tensor} groups",
            )


def _mamba2(settings: Settings) -> Iterator[Problem]:
    model, parallel = settings.model, settings.parallel
    tensor, context = parallel.tensor, parallel.context
    heads, groups = model.mamba_heads, model.mamba_num_groups
    if model.mamba_num_heads is None and 2 * model.hidden_size % model.mamba_head_dim:
        near = sizes_that(lambda size: 2 * model.hidden_size % size == 0, model.mamba_head_dim, "model.mamba_head_dim")
        yield Problem(
            "model.mamba_head_dim",
            f"is {model.mamba_head_dim}, which does not divide 2 x model.hidden_size ({2 * model.hidden_size}); "
            f"set model.mamba_num_heads{near}",
        )
        return
    near = sizes_that(lambda size: heads % size == 0, groups, "model.mamba_num_groups")
    yield from multiple_of("model.mamba_num_heads", heads, groups, f"model.mamba_num_groups ({groups})", near)
    near = sizes_that(lambda size: groups % size == 0 and heads % size == 0, tensor, "parallel.tensor")
    yield from multiple_of("model.mamba_num_heads", heads, tensor, f"parallel.tensor ({tensor})", near)
    yield from multiple_of("model.mamba_num_groups", groups, tensor, f"parallel.tensor ({tensor})", near)
    if heads % tensor == 0 and groups % tensor == 0 and not _context_fits(heads // tensor, groups // tensor, context):
        near = sizes_that(
            lambda size: _context_fits(heads // tensor, groups // tensor, size), context, "parallel.context"
        )
        yield Problem(
            "parallel.context",
            f"is {context}, but must divide the Mamba heads of a tensor-parallel rank ({heads} / {tensor} = "
            f"{heads // tensor}) and divide, or be a multiple of, its groups ({groups} / {tensor} = "
            f"{groups // tensor}){near}",
        )
    channels = model.mamba_inner_size + 2 * groups * model.mamba_state_dim
    if model.kernels == "fused" and channels // tensor % 8:
        yield Problem(
            "model.kernels",
            f"is 'fused', but mamba-ssm's kernel takes convolution channels in multiples of 8 and a rank has "
            f"(heads x head width + 2 x groups x state) / tensor = {channels // tensor}; set it to 'reference'",
        )
    yield from _convolution(settings)


def _context_fits(heads: int, groups: int, context: int) -> bool:
    """Whether `context` ranks can share the Mamba heads and groups of one tensor-parallel rank (all-to-all)."""
    return heads % context == 0 and (groups % context == 0 if groups >= context else context % groups == 0)


def _mamba1(settings: Settings) -> Iterator[Problem]:
    model, tensor, context = settings.model, settings.parallel.tensor, settings.parallel.context
    inner = model.mamba_inner_size
    if inner % (tensor * context):
        near = sizes_that(lambda size: inner % (size * context) == 0, tensor, "parallel.tensor")
        if not near:
            near = sizes_that(lambda size: inner % (size * tensor) == 0, context, "parallel.context")
        if not near:
            near = sizes_that(lambda size: inner % size == 0, tensor, "parallel.tensor")
            near += sizes_that(lambda size: inner % size == 0, context, "parallel.context").replace("; or set", " and")
        yield Problem(
            "model.mamba_expand",
            f"is {model.mamba_expand}: mamba_expand x model.hidden_size is {inner}, no multiple of parallel.tensor x "
            f"parallel.context ({tensor} x {context}){near}",
        )
    if model.kernels == "fused" and model.mamba_state_dim > 256:
        yield Problem(
            "model.mamba_state_dim",
            f"is {model.mamba_state_dim}, but mamba-ssm's selective scan takes at most 256; nearest: 256, "
            "or set model.kernels to 'reference'",
        )
    yield from _convolution(settings)


def _convolution(settings: Settings) -> Iterator[Problem]:
    width = settings.model.mamba_conv_kernel
    if settings.model.kernels == "fused" and not 2 <= width <= 4:
        yield Problem(
            "model.mamba_conv_kernel",
            f"is {width}, but causal-conv1d takes 2, 3 or 4; nearest: {min(max(width, 2), 4)}, "
            "or set model.kernels to 'reference'",
        )


def _experts(settings: Settings, moe_layers: int) -> Iterator[Problem]:
    model, parallel = settings.model, settings.parallel
    experts, tensor = model.num_experts, parallel.tensor
    if not moe_layers:
        if experts is not None:
            yield Problem(
                "model.num_experts",
                f"is {experts}, but the layer pattern has no 'E'; set it to None, or write an 'E' in the pattern",
            )
        if parallel.expert > 1:
            yield Problem(
                "parallel.expert", f"is {parallel.expert}, but the layer pattern has no 'E' to split; nearest: 1"
            )
        return
    if experts is None:
        yield Problem(
            "model.num_experts", f"is not set, but the layer pattern has {moe_layers} 'E'; set it, for example to 8"
        )
    else:
        near = sizes_that(lambda size: experts % size == 0, parallel.expert, "parallel.expert")
        what = f"parallel.expert ({parallel.expert})"
        yield from multiple_of("model.num_experts", experts, parallel.expert, what, near)
        if model.moe_top_k > experts:
            yield Problem("model.moe_top_k", f"is {model.moe_top_k}, more than model.num_experts ({experts})")
    if model.moe_top_k == 1 and model.moe_router_score == "softmax":
        yield Problem(
            "model.moe_top_k",
            "is 1 with moe_router_score 'softmax': a softmax over one expert is always 1 and teaches the router "
            "nothing; nearest: 2, or set model.moe_router_score to 'sigmoid'",
        )
    what = f"parallel.tensor ({tensor})"
    yield from multiple_of("model.moe_ffn_hidden_size", model.moe_ffn_size, tensor, what)
    if model.moe_shared_expert_size is not None:
        yield from multiple_of("model.moe_shared_expert_size", model.moe_shared_expert_size, tensor, what)
        if model.add_linear_bias:
            yield Problem("model.add_linear_bias", "is True, but shared experts have no biases; nearest: False")
    elif model.add_linear_bias and tensor > 1:
        yield Problem(
            "model.add_linear_bias",
            f"is True, but experts have biases only without tensor parallelism; parallel.tensor is {tensor}",
        )
    if tensor > 1 and not parallel.sequence:
        yield Problem(
            "parallel.sequence",
            f"is False, but megatron-core trains MoE layers under tensor parallelism ({tensor}) only with sequence "
            "parallelism; set it to True",
        )


def fp8(settings: Settings, pattern: Pattern) -> Iterator[Problem]:
    """Both sides of every weight on a rank, and the tokens, must be multiples of 16 (transformer-engine).

    What the ranks cannot share equally is another rule's to say.
    """
    model, parallel = settings.model, settings.parallel
    counts = pattern.counts()
    whole: dict[str, tuple[str, int]] = {"hidden size": ("model.hidden_size", model.hidden_size)}
    cut: dict[str, tuple[str, int]] = {}
    if counts["*"]:
        width = (model.num_attention_heads + 2 * model.query_groups) * model.head_dim
        cut["query-key-value width"] = ("model.num_query_groups", width)
        heads = model.num_attention_heads * model.head_dim
        cut["attention heads x head width"] = ("model.num_attention_heads", heads)
    if counts["M"]:
        inner = model.mamba_inner_size
        cut["inner Mamba width"] = ("model.mamba_num_heads", inner)
        if model.mamba_version == 2:
            width = 2 * inner + 2 * model.mamba_num_groups * model.mamba_state_dim + model.mamba_heads
            what = "(2 x heads x head width + 2 x groups x state + heads)"
            cut[what] = ("model.mamba_num_heads", width)
        else:
            what = "time-step rank + 2 x state"
            whole[what] = ("model.mamba_dt_rank", model.dt_rank + 2 * model.mamba_state_dim)
    if counts["-"]:
        cut["MLP width"] = ("model.ffn_hidden_size", model.ffn_size)
    if pattern.mtp:
        cut["MTP projection"] = ("model.hidden_size", model.hidden_size)
    if counts["E"]:
        cut["expert width"] = ("model.moe_ffn_hidden_size", model.moe_ffn_size)
        if model.moe_shared_expert_size:
            cut["shared expert width"] = ("model.moe_shared_expert_size", model.moe_shared_expert_size)
    for symbol in "+DG":
        if counts[symbol]:
            whole |= variant_checks.fp8_whole(settings, symbol)
            cut |= variant_checks.fp8_cut(settings, symbol)
    sides = whole | {
        f"{what} / tensor": (place, width // parallel.tensor)
        for what, (place, width) in cut.items()
        if width % parallel.tensor == 0
    }
    ranks = parallel.context * (parallel.tensor if parallel.sequence else 1)
    tokens = settings.trainer.micro_batch_size * settings.data.sequence_length
    if tokens % ranks == 0:
        sides["tokens of a micro batch on a rank"] = ("trainer.micro_batch_size", tokens // ranks)
    for what, (place, width) in sides.items():
        if width % FP8_MULTIPLE:
            below, above = width // FP8_MULTIPLE * FP8_MULTIPLE, (width // FP8_MULTIPLE + 1) * FP8_MULTIPLE
            yield Problem(
                place,
                f"makes {what} {width}, but FP8 takes multiples of {FP8_MULTIPLE}; nearest: "
                f"{f'{below} or ' if below else ''}{above}, or trainer.precision 'bf16'",
            )

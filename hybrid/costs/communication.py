"""What one GPU sends in a training step, by the axis of the layout, and how long that takes.

Bytes are those that leave a GPU in ring algorithms: an all-gather or a reduce-scatter over n ranks of b bytes sends
b (n - 1) / n, an all-reduce twice that, an all-to-all as much as an all-gather. Ranks are laid out as Megatron does:
tensor innermost, then context and data (experts within these), pipeline outermost.
"""

from dataclasses import dataclass

from hybrid.config import Settings
from hybrid.costs import hardware as hw
from hybrid.costs import memory, parameters, pipeline
from hybrid.costs.hardware import Gpu
from hybrid.pattern import Pattern


@dataclass(frozen=True)
class Axis:
    """Messages of one axis: bytes one GPU sends and seconds they take, in a step, if nothing hides them."""

    size: int
    bytes: float
    seconds: float


def per_step(settings: Settings, pattern: Pattern, stage: int, world_size: int, gpu: Gpu) -> dict[str, Axis]:
    """Messages of a GPU of one pipeline stage, by axis; an axis of size 1 has none."""
    parallel, trainer = settings.parallel, settings.trainer
    replicas = settings.replicas(world_size)
    micro_batches = settings.micro_batches(world_size)
    chunks = pipeline.chunks_of(pattern, parallel.pipeline, stage)
    symbols = "".join(pattern.segments[chunk] for chunk in chunks)
    is_last = chunks[-1] == len(pattern.segments) - 1
    if is_last:
        symbols += pattern.mtp * pattern.mtp_depths
    ends = (stage == 0) + is_last * (1 + pattern.mtp_depths)
    tokens = trainer.micro_batch_size * settings.data.sequence_length / parallel.context
    sent = {
        "tensor": _tensor(settings, symbols, ends),
        "context": _context(settings, symbols),
        "expert": _expert(settings, symbols),
        "pipeline": _pipeline(settings, len(chunks)),
    }
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "expert": parallel.expert}
    strides = {"tensor": 1, "context": parallel.tensor, "expert": parallel.tensor}
    axes: dict[str, Axis] = {}
    for name, size in (sizes | {"pipeline": parallel.pipeline}).items():
        per_token, messages = sent[name]
        if size == 1 or not per_token:
            continue
        stride = strides.get(name, world_size // parallel.pipeline)
        seconds = per_token * tokens / rate(gpu, stride, size) + messages * hw.MESSAGE_SECONDS
        axes[name] = Axis(size, per_token * tokens * micro_batches, seconds * micro_batches)
    shared = replicas * parallel.context
    if shared > 1:
        volume = _data(settings, pattern, stage, shared)
        seconds = volume / rate(gpu, parallel.tensor, shared) + 2 * hw.MESSAGE_SECONDS
        axes["data"] = Axis(shared, volume, seconds)
    return axes


def rate(gpu: Gpu, stride: int, size: int) -> float:
    """Bytes per second that each of `size` ranks, `stride` apart, sends to the others.

    Within a node over its links. Across nodes over as many ports as the ranks have in a node, at most at the links'
    rate.
    """
    if stride * size <= gpu.per_node:
        return gpu.link * hw.NETWORK_SHARE
    in_node = max(1, gpu.per_node // stride)
    return min(gpu.link, gpu.network * in_node) * hw.NETWORK_SHARE


def _tensor(settings: Settings, symbols: str, ends: int) -> tuple[float, int]:
    """Bytes per token and messages per micro batch: each layer gathers its input and sums its output.

    All-reduce in both directions, or with sequence parallelism an all-gather and a reduce-scatter forward and two and
    one backward. `ends` counts embeddings and output layers, which do half of a layer.
    """
    model, parallel = settings.model, settings.parallel
    share = (parallel.tensor - 1) / parallel.tensor
    forward, backward = (2, 3) if parallel.sequence else (2, 2)
    if settings.trainer.recompute == "full":
        backward += forward
    dense = len(symbols) - symbols.count("E") + ends / 2
    # Routed experts gather and sum every copy of a token.
    routed = symbols.count("E") * (model.moe_top_k + (1 if model.moe_shared_expert_size else 0))
    sent = (dense + routed) * (forward + backward) * model.hidden_size * 2 * share
    if model.mamba_version == 1:
        low_rank = model.dt_rank + 2 * model.mamba_state_dim
        sent += symbols.count("M") * 4 * low_rank * 2 * share
    return sent, len(symbols) * (forward + backward)


def _context(settings: Settings, symbols: str) -> tuple[float, int]:
    """Bytes per token of the rank: Mamba turns sequence into heads and back, attention passes on keys and values."""
    model, parallel = settings.model, settings.parallel
    context, tensor = parallel.context, parallel.tensor
    share = (context - 1) / context
    inner = model.mamba_inner_size
    if model.mamba_version == 2:
        groups = max(model.mamba_num_groups, context * tensor)
        turned = 3 * inner + 2 * groups * model.mamba_state_dim + model.mamba_heads
    else:
        turned = 3 * inner
    mamba = symbols.count("M") * 2 * turned / tensor * 2 * share
    delta = symbols.count("G") * 2 * (model.gdn_projected + model.gdn_value_size) / tensor * 2 * share
    latent = model.mla_kv_rank + model.mla_rope_head_dim
    heads = model.num_attention_heads / tensor
    keys = {
        "*": 2 * max(model.query_groups, tensor) * model.head_dim / tensor,
        "+": heads * (model.mla_query_head_dim + model.mla_value_head_dim),
        "D": latent + model.dsa_index_head_dim,
    }
    attention = sum(symbols.count(symbol) * 3 * width * 2 * (context - 1) for symbol, width in keys.items())
    turns = symbols.count("M") * 4 + symbols.count("G") * 4
    return mamba + delta + attention, turns + sum(map(symbols.count, keys)) * 3 * (context - 1)


def _expert(settings: Settings, symbols: str) -> tuple[float, int]:
    """Bytes per token: copies go to their experts and come back, forward and backward."""
    model, parallel = settings.model, settings.parallel
    share = (parallel.expert - 1) / parallel.expert
    tokens = 1 / parallel.tensor if parallel.sequence else 1.0
    moe_layers = symbols.count("E")
    return moe_layers * 4 * model.moe_top_k * model.hidden_size * 2 * tokens * share, moe_layers * 4


def _pipeline(settings: Settings, chunks: int) -> tuple[float, int]:
    """Bytes per token: hidden states to the next stage and their gradients to the one before, for each chunk."""
    parallel = settings.parallel
    width = 4 if settings.trainer.precision == "fp32" else 2
    states = settings.model.hidden_size * width / (parallel.tensor if parallel.sequence else 1)
    return chunks * 2 * states, chunks * 2


def _data(settings: Settings, pattern: Pattern, stage: int, shared: int) -> float:
    """Bytes per step: gradients are summed, and the weights that each rank has updated are gathered."""
    held = parameters.rank(settings, pattern, stage).total
    experts = parameters.experts_of_rank(settings, pattern, stage)
    gradient = memory.gradient_width(settings)
    weight = 4 if settings.trainer.precision == "fp32" else 2
    each = gradient + (weight if settings.parallel.distributed_optimizer else gradient)
    expert_ranks = shared / settings.parallel.expert
    return each * ((held - experts) * (shared - 1) / shared + experts * (expert_ranks - 1) / expert_ranks)

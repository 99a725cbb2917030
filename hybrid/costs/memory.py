"""Bytes that a rank's GPU holds at the fullest moment of a training step, and that generation keeps per sequence.

Weights, gradients and optimizer state follow from Megatron's DDP and optimizer. Activations are the tensors that the
modules save for the backward pass (megatron-core's layer specs with transformer-engine, mamba-ssm and flash attention),
counted one by one in `saved`. A step is fullest either when the loss is differentiated, with every layer's activations
still there, or when a layer of the last micro batch is differentiated.
"""

from dataclasses import dataclass, fields

from hybrid.config import ModelConfig, Settings
from hybrid.costs import parameters, pipeline
from hybrid.costs.parameters import Parameters
from hybrid.pattern import Pattern

# Bytes per logit while the loss is differentiated: the logits and their gradient, bf16 (transformer-engine's fused
# cross entropy).
LOGIT_BYTES = 4
# Positions between the fp32 states that mamba-ssm's selective scan keeps (two numbers per state).
SCAN_CHUNK = 2048
# What the CUDA context, NCCL and cuBLAS take beside PyTorch's own memory, and the part of that which is lost to
# fragments: both on top of the peak that PyTorch reports, when it is asked whether a run fits.
CONTEXT_BYTES = 1.5 * 2**30
FRAGMENTS_SHARE = 0.03


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the fullest moment, by part: the peak that PyTorch's allocator reports."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def fits(self, capacity: float) -> bool:
        """Whether a GPU on which PyTorch sees `capacity` bytes holds it."""
        return self.total * (1 + FRAGMENTS_SHARE) + CONTEXT_BYTES <= capacity


def training(settings: Settings, pattern: Pattern, stage: int, world_size: int) -> Memory:
    """Bytes of a rank of a pipeline stage. `pattern` has its segments (`pipeline.stage_pattern`)."""
    trainer, parallel = settings.trainer, settings.parallel
    of_rank = parameters.rank(settings, pattern, stage)
    held = of_rank.total
    experts = parameters.experts_of_rank(settings, pattern, stage)
    chunks = pipeline.chunks_of(pattern, parallel.pipeline, stage)
    is_last = chunks[-1] == len(pattern.segments) - 1
    tokens = trainer.micro_batch_size * settings.data.sequence_length / parallel.context
    micro_batches = settings.micro_batches(world_size)

    symbols = "".join(pattern.segments[chunk] for chunk in chunks)
    stream = _stream_bytes(settings)
    per_token = sum(symbols.count(symbol) * saved(settings, symbol) for symbol in set(symbols))
    logits, weight_gradient = 0.0, 0.0
    if is_last:
        per_depth = 4 * stream + sum(saved(settings, symbol) for symbol in pattern.mtp)
        per_token += 2 * stream + pattern.mtp_depths * per_depth
        columns = settings.model.padded_vocab_size // parallel.tensor
        logits = tokens * columns * LOGIT_BYTES * (1 + pattern.mtp_depths) * _width(settings) / 2
        weight_gradient = columns * settings.model.hidden_size * _width(settings)
    kept = per_token * tokens * pipeline.in_flight(pattern, parallel.pipeline, stage, micro_batches)
    # One layer at a time has its gradients, and what was dropped of it, beside the rest.
    symbols += pattern.mtp if is_last else ""
    at_layer = tokens * max(transient(settings, symbol) for symbol in set(symbols))
    at_loss = logits + weight_gradient
    return Memory(
        weights=held * _width(settings) + _fp8_weights(settings, of_rank),
        gradients=held * gradient_width(settings),
        optimizer=_optimizer(settings, held - experts, experts, world_size),
        activations=kept + (at_layer if at_layer > at_loss else 0.0),
        logits=logits if at_loss >= at_layer else 0.0,
        buffers=weight_gradient if at_loss >= at_layer else 0.0,
    )


def saved(settings: Settings, symbol: str) -> float:
    """Bytes per token that a layer keeps from its forward to its backward pass, under the chosen recomputation."""
    recompute = settings.trainer.recompute
    if recompute == "full" or (recompute == "selective" and symbol in "-E"):
        return _stream_bytes(settings)
    return _all_saved(settings, symbol)


def transient(settings: Settings, symbol: str) -> float:
    """Bytes per token that a layer's backward pass needs besides what was kept: the gradients, and what it makes again.

    The gradients on the way through a layer are as large as the widest tensors they belong to, two at a time. Mamba-1
    holds nine tensors of its inner width at once: its output's gradient, convolved x and delta with their gradients,
    and twice the gradients of x and z, which are turned around at the end.
    """
    model, kept = settings.model, _all_saved(settings, symbol)
    again = kept - saved(settings, symbol)
    if symbol == "M" and model.mamba_version == 1:
        return again + 9 * model.mamba_inner_size * _width(settings) / settings.parallel.tensor
    return again + kept / 2


def gradient_width(settings: Settings) -> int:
    """Bytes of a gradient in DDP's buffer: fp32, or bf16 with the precision-aware optimizer."""
    return 2 if settings.optimizer.precision_aware else 4


def _width(settings: Settings) -> int:
    return 4 if settings.trainer.precision == "fp32" else 2


def _stream_bytes(settings: Settings) -> float:
    """Bytes per token of the residual stream on a rank."""
    parallel = settings.parallel
    return settings.model.hidden_size * _width(settings) / (parallel.tensor if parallel.sequence else 1)


def _all_saved(settings: Settings, symbol: str) -> float:
    """Bytes per token that a layer keeps without recomputation.

    With FP8, a linear layer keeps its input in 8 bits.
    """
    model, tensor, width = settings.model, settings.parallel.tensor, _width(settings)
    stream = _stream_bytes(settings)
    input_width = 1 if settings.trainer.precision.startswith("fp8") else width
    normed = stream * input_width / width
    match symbol:
        case "M" if model.mamba_version == 2:
            inner = model.mamba_inner_size
            projected = 2 * inner + 2 * model.mamba_num_groups * model.mamba_state_dim + model.mamba_heads
            # zxBCdt, the scan's output before the gated norm, the output projection's input
            own = projected * width + inner * width + inner * input_width
        case "M":
            # x and z, the scan's output before the gate, the output projection's input; B, C and dt; states at the ends
            # of chunks. The convolved x and delta are made again (hybrid/model/mamba1_fused.py).
            inner = model.mamba_inner_size
            low_rank = (model.dt_rank + 2 * model.mamba_state_dim) * tensor
            own = (3 * inner + low_rank) * width + inner * input_width
            own += inner * 2 * model.mamba_state_dim * 4 / SCAN_CHUNK
        case "*":
            query, key = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
            # queries, keys, values; output, which is the projection's input too; row sums in fp32
            own = (query + 2 * key) * width + query * width + 4 * model.num_attention_heads
        case "+" | "D":
            return stream + normed + _latent(settings, symbol, width, input_width)
        case "G":
            # The projection, its convolved part, queries and keys with length 1 and one a value head, the decays in
            # fp32, the rule's output before the norm, the output projection's input
            key, value, heads = model.gdn_key_size, model.gdn_value_size, model.gdn_num_value_heads
            spread = 2 * heads * model.gdn_key_head_dim
            own = (model.gdn_projected + 4 * key + value + spread + value) * width + 8 * heads + value * input_width
        case "-":
            own = _mlp(model, model.ffn_size, width, input_width)
        case "E":
            # Each of a token's experts gets its own copy of the token and of its result.
            experts = model.moe_top_k * (2 * model.hidden_size * width + _mlp(model, model.moe_ffn_size, width, width))
            shared = _mlp(model, model.moe_shared_expert_size or 0, width, input_width)
            return stream + normed + (experts + shared) / tensor + 8.0 * (model.num_experts or 0)
        case _:
            raise AssertionError(f"no layer is written {symbol!r}")
    return stream + normed + own / tensor


def _latent(settings: Settings, symbol: str, width: int, input_width: int) -> float:
    """Bytes per token of latent attention, its input aside.

    Sparse attention is megatron-core's in PyTorch, which keeps the scores of all positions, in fp32 and in the model's
    own format, and for the indexer's loss its mask.
    """
    model, parallel = settings.model, settings.parallel
    heads, value = model.num_attention_heads, model.mla_value_head_dim
    query, latent = model.mla_query_head_dim, model.mla_kv_rank + model.mla_rope_head_dim
    # The low ranks before and after their norms, which each rank has for its part of the sequence.
    low = 2 * (model.mla_query_rank + model.mla_kv_rank) * width / (parallel.tensor if parallel.sequence else 1)
    if symbol == "+":
        own = heads * ((2 * query + 2 * value) * width + 4)
        return low + own / parallel.tensor
    positions = settings.data.sequence_length
    own = heads * (query + latent + model.mla_kv_rank) * width + heads * value * input_width
    scores = positions * heads * (4 + width)
    indexer = (model.dsa_index_heads + 1) * model.dsa_index_head_dim * width + 4 * positions
    return low + (own + scores) / parallel.tensor + latent * width + indexer


def _mlp(model: ModelConfig, inner: int, width: int, input_width: int) -> float:
    """Bytes per token between the two products: the activation's input and its output."""
    return inner * ((2 if model.activation == "swiglu" else 1) * width + input_width)


def _fp8_weights(settings: Settings, held: Parameters) -> float:
    """Bytes of the 8-bit copies of a rank's weights, one for each direction; embedding and output layer have none."""
    return 2.0 * held.non_embedding if settings.trainer.precision.startswith("fp8") else 0.0


def _optimizer(settings: Settings, dense: int, experts: int, world_size: int) -> float:
    """Bytes of the optimizer's state; with the distributed optimizer, divided over the ranks that hold the same."""
    parallel = settings.parallel
    if settings.optimizer.precision_aware:
        each = 6  # both moments in bf16, and the 16 bits that the weight lacks to fp32
    elif settings.trainer.precision == "fp32":
        each = 8  # both moments
    else:
        each = 12  # fp32 weight and both moments
    if not parallel.distributed_optimizer:
        return float(each * (dense + experts))
    shared = world_size // (parallel.tensor * parallel.pipeline)
    return each * (dense / shared + experts / (shared / parallel.expert))


@dataclass(frozen=True)
class Inference:
    """Bytes that generation keeps on all ranks together, at the model's own precision of 16 bits."""

    weights: float
    state_per_sequence: float  # SSM and delta states and convolution inputs, whatever the length
    cache_per_token: float  # keys and values, of latent attention those of all heads


def inference(settings: Settings, width: int = 2) -> Inference:
    """Bytes of weights, of the state of one sequence, and of the keys and values of each of its tokens."""
    model = settings.model
    counts = model.pattern.counts(include_mtp=False)
    inner, state = model.mamba_inner_size, model.mamba_state_dim
    convolved = inner + (2 * model.mamba_num_groups * state if model.mamba_version == 2 else 0)
    whole = parameters.whole(settings)
    delta = model.gdn_value_size * model.gdn_key_head_dim
    delta += (2 * model.gdn_key_size + model.gdn_value_size) * model.gdn_conv_kernel
    latent = model.num_attention_heads * (model.mla_query_head_dim + model.mla_value_head_dim)
    cached = counts["*"] * 2 * model.query_groups * model.head_dim + (counts["+"] + counts["D"]) * latent
    mamba = inner * state + convolved * model.mamba_conv_kernel
    return Inference(
        weights=float(width * (whole.total - whole.mtp)),
        state_per_sequence=float((counts["M"] * mamba + counts["G"] * delta) * width),
        cache_per_token=float(cached * width),
    )

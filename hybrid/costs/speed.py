"""Seconds that a rank computes, from few constants of its GPU (`hybrid.costs.hardware`).

A time is matrix products at a share of the peak that grows with their size, plus everything else at the speed of the
memory. Per token times are of one rank: widths are divided by the tensor parallel size, heads and sequence by the
context parallel size, which leaves a token of the rank's own share the same cost.
"""

from dataclasses import dataclass

from hybrid.config import Settings
from hybrid.costs import flops
from hybrid.costs import hardware as hw
from hybrid.costs.hardware import Gpu
from hybrid.pattern import Pattern

BF16_BYTES = 2


@dataclass(frozen=True)
class Seconds:
    """Forward and backward seconds."""

    forward: float
    backward: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(self.forward * factor, self.backward * factor)

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def layer(settings: Settings, symbol: str, gpu: Gpu) -> Seconds:
    """Seconds per token of one layer on one rank, without recomputation."""
    model, tensor = settings.model, settings.parallel.tensor
    fp8 = settings.trainer.precision.startswith("fp8")
    seconds = Seconds(0.0, 0.0)
    for position, (rows, columns, uses) in enumerate(flops.products(model, symbol)):
        # The first product of a pair is cut along its outputs, the second along its inputs.
        cut = (rows, columns // tensor) if position % 2 == 0 else (rows // tensor, columns)
        share = hw.EXPERTS_SHARE if symbol == "E" and uses == model.moe_top_k else 1.0
        seconds += product(*cut, gpu, fp8) * (uses / share)
    seconds += _core(settings, symbol, gpu)
    stream = model.hidden_size / (tensor if settings.parallel.sequence else 1)
    return seconds + _moved(stream, hw.NORM_PASSES, gpu)


def product(rows: int, columns: int, gpu: Gpu, fp8: bool = False) -> Seconds:
    """Seconds per token of a product with a weight of `rows` inputs and `columns` outputs."""
    side = min(rows, columns)
    share = hw.MATRIX_SHARE * side / (side + hw.MATRIX_HALF_SIZE)
    casts = Seconds(0.0, 0.0)
    rate = gpu.bf16 * share
    if fp8 and gpu.fp8:
        rate = gpu.fp8 * share * hw.FP8_SHARE
        memory = gpu.bandwidth * hw.BANDWIDTH_SHARE
        casts = Seconds(rows * hw.FP8_CAST_BYTES / memory, columns * hw.FP8_CAST_BYTES / memory)
    return Seconds(2.0 * rows * columns / rate, 4.0 * rows * columns / rate) + casts


def output(settings: Settings, gpu: Gpu) -> Seconds:
    """Seconds per token of the output layer and the loss (not in FP8)."""
    model = settings.model
    logits = model.padded_vocab_size // settings.parallel.tensor
    loss = logits * hw.LOSS_BYTES / (gpu.bandwidth * hw.BANDWIDTH_SHARE)
    return product(model.hidden_size, logits, gpu) + Seconds(loss / 2, loss / 2)


def segments(settings: Settings, pattern: Pattern, gpu: Gpu) -> list[Seconds]:
    """Seconds per token of each pipeline segment, with the output layer and the MTP depths in the last one.

    Recomputation (`trainer.recompute`) is part of the backward pass.
    """
    layers = {symbol: layer(settings, symbol, gpu) for symbol in set(pattern.layers + pattern.mtp)}
    return [_segment(settings, pattern, index, layers, gpu) for index in range(len(pattern.segments))]


def _segment(settings: Settings, pattern: Pattern, index: int, layers: dict[str, Seconds], gpu: Gpu) -> Seconds:
    is_last = index == len(pattern.segments) - 1
    symbols = pattern.segments[index] + (pattern.mtp * pattern.mtp_depths if is_last else "")
    recompute = settings.trainer.recompute
    seconds = Seconds(0.0, 0.0)
    for symbol, each in layers.items():
        again = each.forward if recompute == "full" or (recompute == "selective" and symbol in "-E") else 0.0
        seconds += (each + Seconds(0.0, again)) * symbols.count(symbol)
    if is_last:
        seconds += output(settings, gpu) * (1 + pattern.mtp_depths)
        if pattern.mtp_depths:
            h = settings.model.hidden_size
            seconds += product(2 * h, h // settings.parallel.tensor, gpu) * pattern.mtp_depths
    return seconds


def launch(settings: Settings, pattern: Pattern, stage: int) -> float:
    """Seconds that the host needs to launch the kernels of one micro batch on a stage, forward and backward."""
    chunks = range(stage, len(pattern.segments), settings.parallel.pipeline)
    symbols = "".join(pattern.segments[chunk] for chunk in chunks)
    if chunks[-1] == len(pattern.segments) - 1:
        symbols += pattern.mtp * pattern.mtp_depths
    again = 4 / 3 if settings.trainer.recompute == "full" else 1.0
    return again * sum(hw.LAUNCH_SECONDS[symbol] for symbol in symbols)


def accumulate(settings: Settings, held: int, gpu: Gpu) -> float:
    """Seconds of adding one micro batch's gradients of `held` parameters to their sum."""
    width = 2 if settings.optimizer.precision_aware else 4
    return held * hw.ACCUMULATE_BYTES[width] / (gpu.bandwidth * hw.BANDWIDTH_SHARE)


def optimizer(settings: Settings, held: float, gpu: Gpu) -> float:
    """Seconds of an optimizer step on a rank that has the state of `held` parameters."""
    moved = held * hw.OPTIMIZER_BYTES[settings.optimizer.precision_aware]
    return moved / (gpu.bandwidth * hw.BANDWIDTH_SHARE) + hw.STEP_SECONDS


def _core(settings: Settings, symbol: str, gpu: Gpu) -> Seconds:
    """What a layer does besides products with weights and its norm."""
    model, tensor = settings.model, settings.parallel.tensor
    match symbol:
        case "M" if model.mamba_version == 2:
            inner, bc = model.mamba_inner_size, 2 * model.mamba_num_groups * model.mamba_state_dim
            forward = scan_products(settings) / tensor / (gpu.bf16 * hw.SCAN_SHARE)
            width = (2 * inner + bc + model.mamba_heads) / tensor
            return Seconds(forward, forward * hw.SCAN_BACKWARD) + _moved(width, hw.MAMBA2_PASSES, gpu)
        case "M":
            inner = model.mamba_inner_size / tensor
            forward = inner * model.mamba_state_dim / (gpu.special * hw.SELECTIVE_SCAN_SHARE)
            scan = Seconds(forward, forward * hw.SELECTIVE_SCAN_BACKWARD)
            return scan + _moved(2 * inner, hw.MAMBA1_PASSES, gpu)
        case "G":
            # As Mamba-2's scan, in the same passes over its projection and convolution.
            forward = flops.core(model, symbol, 0) / tensor / (gpu.bf16 * hw.SCAN_SHARE)
            return Seconds(forward, forward * hw.SCAN_BACKWARD) + _moved(
                model.gdn_projected / tensor, hw.MAMBA2_PASSES, gpu
            )
        case "*" | "+" | "D":
            operations = flops.core(model, symbol, settings.data.sequence_length) / tensor
            forward = operations / (gpu.bf16 * hw.ATTENTION_SHARE)
            computed = Seconds(forward, forward * hw.ATTENTION_BACKWARD)
            if symbol != "D":
                return computed
            # Megatron's sparse attention in PyTorch goes over the scores of all positions, in fp32.
            scores = 2 * model.num_attention_heads * settings.data.sequence_length / tensor
            return computed + _moved(scores, hw.SPARSE_PASSES, gpu)
        case "-":
            return _activation(settings, model.ffn_size, gpu)
        case "E":
            experts = _activation(settings, model.moe_ffn_size, gpu) * model.moe_top_k
            shared = _activation(settings, model.moe_shared_expert_size or 0, gpu)
            stream = model.hidden_size / (tensor if settings.parallel.sequence else 1)
            return experts + shared + _moved(model.moe_top_k * stream, hw.PERMUTATION_PASSES, gpu)
        case _:
            raise AssertionError(f"no layer is written {symbol!r}")


def scan_products(settings: Settings) -> float:
    """Operations per token of the matrix products of Mamba-2's chunked scan, forward (arXiv 2405.21060, section 6).

    C B^T of each group and its product with x within a chunk (full squares), states in and out of the chunk.
    """
    model = settings.model
    inner, state = model.mamba_inner_size, model.mamba_state_dim
    chunk = min(model.mamba_chunk_size, settings.data.sequence_length)
    return 2.0 * chunk * state * model.mamba_num_groups + 2.0 * chunk * inner + 4.0 * state * inner


def _activation(settings: Settings, width: int, gpu: Gpu) -> Seconds:
    gated = 1.5 if settings.model.activation == "swiglu" else 1.0
    return _moved(gated * width / settings.parallel.tensor, hw.ACTIVATION_PASSES, gpu)


def _moved(width: float, passes: tuple[float, float], gpu: Gpu) -> Seconds:
    """Seconds per token of passes (forward, backward) over `width` bf16 numbers."""
    rate = gpu.bandwidth * hw.BANDWIDTH_SHARE / (width * BF16_BYTES) if width else float("inf")
    return Seconds(passes[0] / rate, passes[1] / rate)

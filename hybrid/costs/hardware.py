"""GPUs and networks: what the datasheets say, and the shares of it that training reaches.

Every number of the time model that is not derived from the settings is in this file. The shares were fitted to one
NVIDIA H200 (`benchmarks/gpu.md`) and are taken to be the same on the other GPUs, which is an assumption. Rates are
per second, sizes in bytes, and a network's rate is in one direction.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, in the form in which eight of them make a node."""

    name: str
    memory: float  # bytes that PyTorch sees
    bf16: float  # dense matrix FLOP/s
    fp8: float | None  # dense matrix FLOP/s; None: no FP8
    bandwidth: float  # memory, bytes/s
    link: float  # to the other GPUs of the node, bytes/s
    network: float = 50e9  # to other nodes, bytes/s: one 400 Gb/s port per GPU
    per_node: int = 8
    special: float  # exponentials/s: SMs x 16 per clock x boost clock
    source: str


# The datasheets give matrix rates with sparsity; dense is half. A link's rate is half of the "total bandwidth" given.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100",
            memory=79.3 * GIB,
            bf16=312e12,
            fp8=None,
            bandwidth=2.039e12,
            link=300e9,
            network=25e9,
            special=108 * 16 * 1.41e9,
            source="NVIDIA A100 datasheet (SXM, 80 GB); 200 Gb/s ports as in DGX A100",
        ),
        Gpu(
            name="h100",
            memory=79.1 * GIB,
            bf16=989.4e12,
            fp8=1978.9e12,
            bandwidth=3.35e12,
            link=450e9,
            special=132 * 16 * 1.83e9,
            source="NVIDIA H100 datasheet (SXM, 80 GB)",
        ),
        Gpu(
            name="h200",
            memory=139.8 * GIB,
            bf16=989.4e12,
            fp8=1978.9e12,
            bandwidth=4.8e12,
            link=450e9,
            special=132 * 16 * 1.83e9,
            source="NVIDIA H200 datasheet (SXM, 141 GB)",
        ),
        Gpu(
            name="b200",
            memory=178.4 * GIB,
            bf16=2250e12,
            fp8=4500e12,
            bandwidth=7.7e12,
            link=900e9,
            special=148 * 16 * 1.97e9,
            source="NVIDIA HGX B200 datasheet (SXM, 180 GB)",
        ),
    )
}

# The GPU whose ratios of speeds say how layers are spread over pipeline stages, whatever GPU runs them: a split must
# not depend on the machine that plans it.
REFERENCE = GPUS["h100"]

# Matrix products: share of the peak that products of endless size reach, and the size of the smaller side of the
# weight at which half of that is left.
MATRIX_SHARE = 0.79
MATRIX_HALF_SIZE = 150
# FP8: speed over what twice the bf16 rate would be, and bytes moved per number that is cast (its largest value is
# looked for, then it is read and written twice, as rows and as columns).
FP8_SHARE = 0.85
FP8_CAST_BYTES = 6
# Grouped products of experts against one product of the same size.
EXPERTS_SHARE = 0.7
# Share of the memory's rate that a copy reaches (4.27 of 4.8 TB/s on the H200).
BANDWIDTH_SHARE = 0.89

# Mamba-2, of the matrix peak: the scan's forward pass; and its backward pass in forward passes.
SCAN_SHARE = 0.062
SCAN_BACKWARD = 2.67
# Mamba-2's other kernels (convolution, gated norm, [s, b] to [b, s] copies): bytes moved, in times of the input
# projection's output, forward and backward.
MAMBA2_PASSES = (8.0, 13.0)
# Mamba-1's selective scan: share of the rate of exponentials, one for each of d x N states, that its forward pass
# reaches, and its backward pass in forward passes. From an 8B-shaped layer (d = 8192) measured with N = 16 and with N
# = 128 (benchmarks/gpu.md): what 112 more states a channel cost is 1.24 ps a state forward and 4.3 ps backward, where
# the states are made again, the recurrence runs in reverse and the gradients of B and C are added up. The memory does
# not bound it: its tensors of the inner width would take 0.4 ps a state at N = 16.
SELECTIVE_SCAN_SHARE = 0.21
SELECTIVE_SCAN_BACKWARD = 3.5
# Mamba-1 between its projections, counted in hybrid/model/mamba1_fused.py: bytes moved, in times of the input
# projection's output (two tensors of the inner width), forward and backward. Forward: x and z are turned around (4
# tensors of the inner width read or written), x convolved (2), scanned and gated (5), turned back (2). Backward: x
# convolved and delta made again (3), the gradient turned around (2), the scan (8), products (5), convolution (3),
# turned back (4).
MAMBA1_PASSES = (6.5, 12.5)
# Causal attention, of the matrix peak, in operations that the mask leaves; its backward pass in forward passes.
ATTENTION_SHARE = 0.28
ATTENTION_BACKWARD = 2.5

# Passes over the residual stream per layer (norm, residual sum), forward and backward.
NORM_PASSES = (5.0, 5.0)
# Passes over the inner width of an MLP (activation), forward and backward.
ACTIVATION_PASSES = (2.0, 3.0)
# Passes over the tokens that experts get (permutation there and back), forward and backward.
PERMUTATION_PASSES = (6.0, 6.0)
# Over the scores of megatron-core's sparse attention in PyTorch, in units of bf16 numbers; counted from its operations
# (product, scale, mask, softmax, product; twice that backward), not measured.
SPARSE_PASSES = (10.0, 20.0)
# Bytes moved per logit by the cross entropy, forward and backward together.
LOSS_BYTES = 10.0
# Bytes moved per parameter when the gradient of a micro batch is added to the sum: fp32 sum; bf16 sum.
ACCUMULATE_BYTES = {4: 12.0, 2: 8.0}
# Bytes moved per parameter of an optimizer step: fp32 state; bf16 state (precision-aware).
OPTIMIZER_BYTES = {False: 34.0, True: 20.0}

# Seconds that the host takes to launch a layer's kernels, forward and backward together: a step is never shorter.
# Not measured: G, D and +, which have about as many kernels as the layers whose times they have here.
LAUNCH_SECONDS = {"M": 4.6e-3, "*": 4.2e-3, "-": 2.1e-3, "E": 6.4e-3, "G": 6.4e-3, "D": 12.8e-3, "+": 6.4e-3}
# Seconds of a step that do not depend on its size: optimizer bookkeeping, logging, waiting for the host.
STEP_SECONDS = 0.02

# Share of a link's or port's rate that large messages reach, and seconds before a message flows.
NETWORK_SHARE = 0.8
MESSAGE_SECONDS = 15e-6
# Share of a reduction or gathering that is hidden behind computation when it is overlapped with it.
OVERLAP_SHARE = 0.9

"""The settings of a run, one dataclass a section. Nothing here imports torch.

A recipe is a fiddle config over these classes (see `recipes/`); `fdl.build` turns it into instances of them. Every
field carries its meaning and, where it is not a plain count, its unit: `hybrid show` prints them, the docs are made
from them. A field that is None where a number is expected is derived from the others; the property of the same family
gives the derived value (`ModelConfig.ffn_size` for `ffn_hidden_size`).
"""

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from hybrid import pattern as patterns
from hybrid.ramp import Ramp

Activation = Literal["gelu", "squared_relu", "swiglu"]
Normalization = Literal["RMSNorm", "LayerNorm"]
PositionEmbedding = Literal["none", "rope", "learned"]
Precision = Literal["fp32", "bf16", "fp8_delayed", "fp8_current"]
Kernels = Literal["auto", "fused", "reference"]
Recompute = Literal["none", "selective", "full"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
DataSource = Literal["stdlib", "text", "indexed", "sft", "mock"]
TooLong = Literal["refuse", "truncate", "drop"]
Tracker = Literal["tensorboard", "wandb"]
OnFault = Literal["stop", "skip", "rollback"]

GATED_NORM_EPSILON = 1e-5
"""What a Mamba-2 layer's gated norm adds, whatever norm_epsilon is: megatron-core (ssm/mamba_mixer.py) fixes it."""


def option(default: Any, doc: str, unit: str = "") -> Any:
    """Return a dataclass field with its one-line meaning and its unit."""
    metadata = {"doc": doc, "unit": unit}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ModelConfig:
    """Which model: layer pattern, widths, and the variants of each layer kind."""

    layer_pattern: str | None = option(None, "layer pattern such as 'M-M*-'; wins over the ratios")
    num_layers: int | None = option(None, "layers of the pattern made from the ratios")
    attention_ratio: float | None = option(None, "share of attention layers in the pattern made from the ratios")
    mlp_ratio: float | None = option(None, "share of MLP layers in the pattern made from the ratios")

    hidden_size: int = option(1024, "width of the residual stream")
    ffn_hidden_size: int | None = option(None, "inner width of an MLP layer; None: 4 x hidden_size")
    activation: Activation = option("gelu", "activation of MLP and expert layers")
    normalization: Normalization = option("RMSNorm", "norm at the input of each layer and before the output layer")
    norm_epsilon: float = option(1e-5, "added to the variance in a norm")
    add_linear_bias: bool = option(False, "biases in attention and MLP projections")

    num_attention_heads: int = option(16, "query heads of an attention layer")
    num_query_groups: int | None = option(None, "key-value heads (GQA); None: num_attention_heads")
    attention_head_dim: int | None = option(None, "width of an attention head; None: hidden_size / num_attention_heads")
    position_embedding: PositionEmbedding = option("none", "position information given to attention")
    rotary_percent: float = option(1.0, "share of each attention head that is rotated (rope)")
    rotary_base: int = option(10000, "base of the rotary frequencies (rope)")

    mamba_version: Literal[1, 2] = option(2, "Mamba-1 (selective scan) or Mamba-2 (state space duality)")
    mamba_state_dim: int = option(128, "state size N of an SSM channel (Mamba-1) or head (Mamba-2)")
    mamba_head_dim: int = option(64, "width P of an SSM head (Mamba-2)")
    mamba_num_heads: int | None = option(None, "SSM heads (Mamba-2); None: 2 x hidden_size / mamba_head_dim")
    mamba_num_groups: int = option(8, "groups that share B and C (Mamba-2)")
    mamba_dt_rank: int | None = option(None, "rank of the time-step projection (Mamba-1); None: hidden_size / 16, up")
    mamba_expand: int = option(2, "inner width over hidden_size (Mamba-1)")
    mamba_conv_kernel: int = option(4, "width of the causal convolution")
    mamba_chunk_size: int = option(128, "positions a chunk of the Mamba-2 scan takes")

    mla_query_rank: int = option(512, "rank of the queries' low-rank projection (+ and D)")
    mla_kv_rank: int = option(512, "rank of the keys' and values' low-rank projection, what all heads share (+ and D)")
    mla_head_dim: int = option(128, "width of a query and key head, without its rotated part (+ and D)")
    mla_rope_head_dim: int = option(64, "rotated width of a query head, and of the one key that all share (+ and D)")
    mla_value_head_dim: int = option(128, "width of a value head (+ and D)")
    dsa_index_heads: int = option(64, "heads of the indexer that chooses positions (D)")
    dsa_index_head_dim: int = option(128, "width of an indexer's head (D)")
    dsa_top_k: int = option(2048, "positions that a query attends to, at most (D)", "tokens")
    dsa_loss_coeff: float = option(0.01, "weight of the loss that the indexer learns by (D)")
    gdn_num_key_heads: int = option(16, "query and key heads of a gated delta net (G)")
    gdn_num_value_heads: int = option(32, "value heads of a gated delta net; a multiple of the key heads (G)")
    gdn_key_head_dim: int = option(128, "width of a query and key head of a gated delta net (G)")
    gdn_value_head_dim: int = option(128, "width of a value head of a gated delta net (G)")
    gdn_conv_kernel: int = option(4, "width of a gated delta net's causal convolution (G)")

    num_experts: int | None = option(None, "experts of an MoE layer")
    moe_top_k: int = option(2, "experts a token is sent to")
    moe_ffn_hidden_size: int | None = option(None, "inner width of an expert; None: ffn_hidden_size")
    moe_shared_expert_size: int | None = option(None, "inner width of the shared expert; None: there is none")
    moe_aux_loss_coeff: float = option(0.01, "weight of the load-balancing loss")
    moe_router_score: Literal["softmax", "sigmoid"] = option("softmax", "score function of the router")
    moe_expert_bias: bool = option(False, "a bias per expert, outside of the loss, in the choice of experts (sigmoid)")
    moe_routed_scale: float = option(1.0, "factor on what the routed experts add (sigmoid)")
    mtp_loss_coeff: float = option(0.1, "weight of the multi-token-prediction loss")

    vocab_size: int = option(256000, "tokens of the vocabulary, before padding")
    vocab_size_multiple: int = option(128, "the embedding is padded to a multiple of this, whatever the layout")
    tie_embeddings: bool = option(False, "the output layer shares the embedding's weights")
    init_std: float = option(0.02, "standard deviation of the initial weights")
    hidden_dropout: float = option(0.0, "dropout on the residual branches")
    attention_dropout: float = option(0.0, "dropout on attention probabilities")
    kernels: Kernels = option("auto", "fused CUDA kernels or the PyTorch reference; auto: fused where they are there")

    @property
    def pattern(self) -> patterns.Pattern:
        """The layer pattern: the explicit one, else the one made from the ratios. Raises ConfigError if wrong."""
        return patterns.settle(self.layer_pattern, self.num_layers, self.attention_ratio, self.mlp_ratio)

    @property
    def ffn_size(self) -> int:
        """Inner width of an MLP layer."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        """Key-value heads of an attention layer."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.attention_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def mamba_heads(self) -> int:
        """SSM heads of a Mamba-2 layer."""
        return self.mamba_num_heads or 2 * self.hidden_size // self.mamba_head_dim

    @property
    def mamba_inner_size(self) -> int:
        """Inner width d of a Mamba layer: heads x head width (Mamba-2), expand x hidden (Mamba-1)."""
        if self.mamba_version == 1:
            return self.mamba_expand * self.hidden_size
        return self.mamba_heads * self.mamba_head_dim

    @property
    def dt_rank(self) -> int:
        """Rank of Mamba-1's time-step projection."""
        return self.mamba_dt_rank or -(-self.hidden_size // 16)

    @property
    def mla_query_head_dim(self) -> int:
        """Width of a query and key head of latent attention."""
        return self.mla_head_dim + self.mla_rope_head_dim

    @property
    def gdn_key_size(self) -> int:
        """Width of a gated delta net's queries, and of its keys."""
        return self.gdn_num_key_heads * self.gdn_key_head_dim

    @property
    def gdn_value_size(self) -> int:
        """Width of a gated delta net's values, and of its gate."""
        return self.gdn_num_value_heads * self.gdn_value_head_dim

    @property
    def gdn_projected(self) -> int:
        """Width of its input projection: query, key, value, gate, and two numbers a value head."""
        return 2 * (self.gdn_key_size + self.gdn_value_size + self.gdn_num_value_heads)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to `vocab_size_multiple`.

        Unlike Megatron's own padding, this does not depend on the tensor parallel size, so that a checkpoint has one
        shape in every layout.
        """
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple

    @property
    def moe_ffn_size(self) -> int:
        """Inner width of an expert."""
        return self.moe_ffn_hidden_size or self.ffn_size


@dataclass(kw_only=True)
class ParallelConfig:
    """How a model is split over processes; what is left of the world is data parallel."""

    tensor: int = option(1, "tensor parallel size")
    pipeline: int = option(1, "pipeline parallel size; '|' in the pattern says where the stages end")
    context: int = option(1, "context parallel size")
    expert: int = option(1, "expert parallel size")
    sequence: bool = option(False, "sequence parallel: norms and dropout split along the sequence (needs tensor > 1)")
    distributed_optimizer: bool = option(True, "optimizer state split over the data parallel ranks")
    overlap_grad_reduce: bool = option(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = option(False, "gather parameters while the forward pass runs")

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


@dataclass(kw_only=True)
class DataConfig:
    """What the model reads."""

    source: DataSource = option(
        "stdlib",
        "stdlib: the running Python's own library; text: a folder of text; indexed: .bin/.idx; sft: examples; mock",
    )
    path: str | None = option(
        None,
        "folder of text files (text), prefixes of .bin/.idx files, with or without weights (indexed), or JSONL (sft)",
    )
    validation_path: str | None = option(None, "what to validate on instead (indexed, sft); then split is not used")
    test_path: str | None = option(None, "what to test on instead (indexed, sft); then split is not used")
    tokenizer: str = option("byte", "'byte', or a tokenizer file or folder")
    sequence_length: int = option(4096, "tokens of a sample", "tokens")
    too_long: TooLong = option(
        "refuse", "examples longer than sequence_length: refuse them all, truncate or drop (sft)"
    )
    split: list[float] = option([99.0, 1.0, 0.0], "shares of training, validation and test")
    cache: str | None = option(None, "folder for prepared data; None: hybrid-recipes in the user's cache folder")
    num_workers: int = option(1, "processes that load samples; 0: in the training process")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = option(2.5e-4, "peak learning rate")
    min_lr: float = option(2.5e-5, "learning rate at the end of the decay")
    schedule: Schedule = option("cosine", "shape of the decay")
    warmup_samples: int | None = option(None, "samples of linear warm-up; or set warmup_steps or _tokens", "samples")
    warmup_steps: int | None = option(None, "steps of linear warm-up", "steps")
    warmup_tokens: int | None = option(None, "tokens of linear warm-up", "tokens")
    decay_samples: int | None = option(None, "samples of the decay, warm-up included; None: the whole run", "samples")
    wsd_decay_samples: int | None = option(
        None, "samples of the decay at the end of a warm-up, stable, decay schedule (wsd); None: a tenth", "samples"
    )
    weight_decay: float = option(0.1, "AdamW weight decay; not on norms, biases, A_log, D and dt_bias")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.95, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    clip_grad: float = option(1.0, "largest gradient norm; 0: no clipping")
    precision_aware: bool = option(False, "bf16 gradients and moments (CUDA, transformer-engine)")


@dataclass(kw_only=True)
class TrainerConfig:
    """How long, in what batches, in what precision."""

    max_steps: int | None = option(None, "optimizer steps of the run; or set max_samples", "steps")
    max_samples: int | None = option(None, "samples of the run; or set max_steps", "samples")
    micro_batch_size: int = option(1, "samples of one forward pass on one process", "samples")
    global_batch_size: int = option(8, "samples of one optimizer step over all processes", "samples")
    rampup_batch_size: list[int] = option(
        [], "global batch at the start, its rises, and the samples until it is whole, as in [32,32,100000]", "samples"
    )
    z_loss_coeff: float = option(0.0, "weight of the squared log of the softmax's sum in the loss (z-loss)")
    precision: Precision = option("bf16", "number format of the forward and backward pass")
    recompute: Recompute = option("none", "activations made again in the backward pass instead of kept")
    seed: int = option(1234, "seed of weights, data order and dropout")
    eval_interval: int = option(2000, "steps between validations; 0: only at the end", "steps")
    eval_steps: int = option(32, "global batches of one validation; 0: no validation", "batches")
    log_interval: int = option(1, "steps between lines of metrics.jsonl", "steps")
    log_to: list[Tracker] = option([], "where the metrics go besides metrics.jsonl: tensorboard, wandb")
    profile: list[int] = option([], "first and last step that torch's profiler records, into the run's folder", "steps")
    memory_snapshot: int | None = option(
        None, "step after which a snapshot of the GPU's memory is written; it holds the step before, too", "steps"
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.max_steps if self.max_steps is not None else self.ramp.steps(self.max_samples or 0)

    @property
    def samples(self) -> int:
        """Samples of the run."""
        return self.max_samples if self.max_samples is not None else self.ramp.consumed(self.steps)

    @property
    def ramp(self) -> Ramp:
        """How the global batch grows; from the start at its full size without `rampup_batch_size`."""
        if len(self.rampup_batch_size) != 3:
            return Ramp(self.global_batch_size, 1, 0, self.global_batch_size)
        return Ramp(*self.rampup_batch_size, full=self.global_batch_size)


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is saved and when."""

    save_interval: int = option(2000, "steps between checkpoints; one more is saved at the end", "steps")
    keep_last: int = option(3, "checkpoints kept, newest first; 0: all of them")
    keep_every: int = option(0, "a checkpoint of a multiple of so many steps is kept for good; 0: none", "steps")
    asynchronous: bool = option(False, "write checkpoints in another process while the training goes on")
    load: str | None = option(None, "checkpoint of any format to start from when the run has none of its own")
    export: str | None = option(None, "FORMAT:PATH, such as hf:PATH, where the weights go when the run is done")


@dataclass(kw_only=True)
class FaultsConfig:
    """What a run does when something goes wrong in it.

    `skip` leaves a step's update out and reads on; `rollback` takes up the last checkpoint's weights and optimizer and
    reads on after the bad batch, none of which is read again.
    """

    on_nan: OnFault = option("stop", "a loss or gradient norm that is NaN or Inf: stop, skip or rollback")
    on_spike: OnFault = option("skip", "a gradient norm above spike_factor times the usual: stop, skip or rollback")
    spike_factor: float = option(0.0, "times the median norm of the last 100 steps that makes a spike; 0: none is one")
    limit: int = option(10, "bad steps among any 1,000 after which the run stops all the same", "steps")
    hang_seconds: int = option(
        600, "time without progress after which a process shows every thread's stack and ends; 0: never", "seconds"
    )


@dataclass(kw_only=True)
class Settings:
    """Everything one run needs; the arguments of `hybrid.run.pretrain`."""

    name: str = option(MISSING, "what the run is called, and its folder in `folder`")
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    folder: str = option("runs", "where the folders of runs are")
    plugins: list[str] = option([], "what is arranged around the run, such as performance or wandb(project='x')")

    @property
    def warmup_samples(self) -> int:
        """Samples of the warm-up, in whatever it is given."""
        given = self.optimizer
        if given.warmup_steps is not None:
            return self.trainer.ramp.consumed(given.warmup_steps)
        if given.warmup_tokens is not None:
            return -(-given.warmup_tokens // self.data.sequence_length)
        return given.warmup_samples or 0

    def replicas(self, world_size: int) -> int:
        """Data parallel replicas of the model on so many processes."""
        return world_size // self.parallel.model_size

    def micro_batches(self, world_size: int) -> int:
        """Micro batches that each process goes through in a step of the full global batch, at least one."""
        samples = self.trainer.micro_batch_size * self.replicas(world_size)
        return max(1, self.trainer.global_batch_size // samples)

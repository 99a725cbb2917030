"""Mamba-1 (Gu and Dao, arXiv 2312.00752) as a mixer of Megatron's `MambaLayer`; megatron-core has Mamba-2 alone.

Tensor parallelism cuts the inner channels: each rank convolves and scans its own. Only the time step's low rank and B
and C depend on all of them; they are summed over the ranks, forward and backward. Context parallelism cuts the channels
once more, after every rank has exchanged its positions of all channels for all positions of its channels.

Parameter names and shapes are those of state-spaces/mamba (`mamba_ssm/modules/mamba_simple.py`), and so are the initial
values; the projections take Megatron's.

Shapes: S positions of this rank, T of the sequence, B batch, h hidden, d inner width of this tensor-parallel rank, c of
this tensor- and context-parallel rank, N state, R rank of the time step, W width of the convolution.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

from hybrid.model.context import to_channels, to_positions
from hybrid.model.conv import causal_conv1d
from hybrid.model.packing import Packed
from hybrid.model.selective_scan import selective_scan

# Time steps at the start: log-uniform between these (mamba_simple.py).
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4

# The dimension along which tensor parallelism cuts each parameter outside the two large projections.
CUTS = {
    "conv1d.weight": 0,
    "conv1d.bias": 0,
    "x_proj.weight": 1,
    "dt_proj.weight": 0,
    "dt_proj.bias": 0,
    "A_log": 0,
    "D": 0,
}


@dataclass(frozen=True)
class Weights:
    """What a rank computes with between the projections: conv (c, W), conv_bias, dt_bias and D (c), x (R+2N, c),
    dt (c, R), A (c, N), negative and in float32."""

    conv: Tensor
    conv_bias: Tensor
    x: Tensor
    dt: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor


class Mamba1Mixer(MegatronModule):
    """Projects to x and z, convolves and scans x, gates it with z, and projects back."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        *,
        state_dim: int,
        conv_kernel: int,
        inner_size: int,
        dt_rank: int,
        fused: bool,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ):
        super().__init__(config)
        self.state_dim, self.dt_rank, self.fused = state_dim, dt_rank, fused
        self.groups = pg_collection
        self.inner_size = inner_size // pg_collection.tp.size()
        common: dict[str, Any] = {"config": config, "bias": False, "is_expert": False, "tp_group": pg_collection.tp}
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            2 * inner_size,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            inner_size,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )
        d = self.inner_size
        made: dict[str, Any] = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork():
            self.conv1d = nn.Conv1d(d, d, conv_kernel, groups=d, **made)
            self.x_proj = nn.Linear(d, dt_rank + 2 * state_dim, bias=False, **made)
            self.dt_proj = nn.Linear(dt_rank, d, **made)
            self.A_log = nn.Parameter(torch.empty(d, state_dim, device=made["device"]))
            self.D = nn.Parameter(torch.empty(d, device=made["device"]))
            if config.perform_initialization:
                self._initialise()
        for name, dim in CUTS.items():
            set_tensor_model_parallel_attributes(self.get_parameter(name), True, dim, 1)

    @torch.no_grad()
    def _initialise(self) -> None:
        assert self.config.init_method is not None
        self.config.init_method(self.x_proj.weight)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        steps = torch.rand(self.inner_size, device=self.D.device)
        steps = (steps * math.log(DT_MAX / DT_MIN)).exp().mul(DT_MIN).clamp(min=DT_FLOOR)
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it gives the steps
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, device=self.D.device).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (S, B, h), under sequence parallelism a part of S; returns the same shape, and no bias."""
        assert inference_context is None
        xz, _ = self.in_proj(hidden_states)
        shared = self.groups.cp.size() > 1
        if shared:
            xz = self._exchange(xz)
        if self.fused:
            y = self._fused(xz, packed_seq_params)
        else:
            y = self._reference(xz, packed_seq_params.seq_idx if packed_seq_params is not None else None)
        return self.out_proj(to_positions(y, self.groups.cp) if shared else y)

    def weights(self) -> Weights:
        """The parameters of this rank's channels."""
        ranks, rank = self.groups.cp.size(), self.groups.cp.rank()
        c = self.inner_size // ranks
        own = slice(rank * c, (rank + 1) * c)
        return Weights(
            conv=self.conv1d.weight[own].squeeze(1),
            conv_bias=self.conv1d.bias[own],  # type: ignore[index]
            x=self.x_proj.weight[:, own],
            dt=self.dt_proj.weight[own],
            dt_bias=self.dt_proj.bias[own].float(),
            A=-torch.exp(self.A_log[own].float()),
            D=self.D[own].float(),
        )

    def sum_ranks(self, low: Tensor) -> Tensor:
        """Sum the ranks' shares of what all channels make together, forward; of its gradient, backward."""
        group = self.groups.tp_cp
        if group.size() == 1:
            return low
        return copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(low, group), group)

    def split_low(self, low: Tensor, dim: int) -> tuple[Tensor, ...]:
        """The time step's low rank, B and C."""
        return low.split([self.dt_rank, self.state_dim, self.state_dim], dim=dim)

    def _exchange(self, xz: Tensor) -> Tensor:
        """xz (S, B, 2d) to (T, B, 2c)."""
        ranks = self.groups.cp.size()
        by_rank = xz.unflatten(-1, (2, ranks, -1)).transpose(2, 3).flatten(2)
        return to_channels(by_rank, self.groups.cp)

    def _reference(self, xz: Tensor, seq_idx: Tensor | None) -> Tensor:
        """xz (T, B, 2c), the input projection; returns (T, B, c)."""
        own = self.weights()
        x, z = xz.transpose(0, 1).chunk(2, dim=-1)
        x = causal_conv1d(x, own.conv, own.conv_bias, seq_idx=seq_idx)
        low, B, C = self.split_low(self.sum_ranks(F.linear(x, own.x)), -1)
        dt = F.linear(low, own.dt)
        y = selective_scan(x, dt, own.A, B, C, own.D, z, own.dt_bias, delta_softplus=True, seq_idx=seq_idx)
        return y.transpose(0, 1).contiguous()

    def _fused(self, xz: Tensor, packed_seq_params: PackedSeqParams | None) -> Tensor:
        """As `_reference`. The kernels cannot start again from zero within a row: they are called for each sequence."""
        from hybrid.model.mamba1_fused import mix

        own = self.weights()
        inputs = (own.conv, own.conv_bias, own.x, own.dt, own.dt_bias, own.A, own.D)
        if packed_seq_params is None:
            return mix(xz, *inputs, self.groups.tp_cp)
        assert isinstance(packed_seq_params, Packed)
        return torch.cat([mix(part, *inputs, self.groups.tp_cp) for part in xz.split(packed_seq_params.lengths)])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As Megatron's Mamba-2 mixer: cut over tensor-parallel ranks, x and z of the input projection apart."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own = {name: self.get_parameter(name) for name in CUTS}
        result: Any = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            CUTS,
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in ("in_proj", "out_proj"):
            result |= sharded_state_dict_default(
                getattr(self, name), f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.groups.tp
            )
        weight = f"{prefix}in_proj.weight"
        result[weight] = _split_tensor_factory(result[weight], [self.inner_size] * 2, ["x", "z"], 0)
        return result

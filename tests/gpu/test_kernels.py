"""Each fused kernel against its reference in float64: values and gradients, over types, groups and odd lengths.

How far apart? Inputs are rounded to the kernel's type first, so that both sides start from the same numbers. In float32
a sum of some hundred to thousand terms is off by about 1e-6 of its size, a few sums in a row by less than 1e-4 of the
norm of a result. In bf16 every intermediate result is rounded to 8 bits (2^-9 = 0.002 of it), and five to ten of them
follow each other: 0.02.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.model.conv import causal_conv1d
from hybrid.model.gated_norm import gated_rms_norm
from hybrid.model.selective_scan import selective_scan
from hybrid.model.ssd import ssd_scan

pytestmark = pytest.mark.gpu

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
TYPES = list(LIMITS)
LENGTHS = [1, 65, 257, 1000]


def _apart(result: Tensor, expected: Tensor, *scales: Tensor) -> float:
    """The norm of the difference over that of `expected`, or over a larger one of `scales`."""
    scale = max(tensor.double().norm() for tensor in (expected, *scales))
    return float((result.double() - expected).detach().norm() / scale.detach())


def _compare(
    dtype: torch.dtype,
    inputs: dict[str, Tensor],
    fused: Any,
    reference: Any,
    exact: tuple[str, ...] = (),
    summed: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda gradients: {},
) -> None:
    """Run both on the same numbers, and their backward passes from the same gradient; `exact` stay in float32.

    `summed` makes of the reference's gradients the terms that one of them is the sum of. Terms that are rounded by
    themselves leave in their sum an error in proportion to their norm, however much of the sum they cancel.
    """
    types = {name: torch.float32 if name in exact else dtype for name in inputs}
    given = {name: tensor.to(types[name]).requires_grad_() for name, tensor in inputs.items()}
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    result, expected = fused(**given), reference(**wide)
    assert result.dtype == dtype and result.shape == expected.shape
    gradient = torch.randn_like(result)
    result.backward(gradient)
    expected.backward(gradient.double())
    ours, theirs = ({name: _gradient(tensor) for name, tensor in side.items()} for side in (given, wide))
    terms = summed(theirs)
    apart = {"result": _apart(result, expected)}
    for name in inputs:
        nothing = [gradient] if not theirs[name].any() else []
        apart[name] = _apart(ours[name], theirs[name], *nothing, *([terms[name]] if name in terms else []))
    print(dtype, {name: f"{value:.1e}" for name, value in apart.items()})
    assert all(value <= LIMITS[dtype] for value in apart.values()), apart


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers whatever ran before."""
    torch.manual_seed(11)


def _randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda") * scale


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [2, 4])
def test_convolution(dtype: torch.dtype, length: int, width: int) -> None:
    from causal_conv1d import causal_conv1d_fn

    inputs = {"x": _randn(2, length, 64), "weight": _randn(64, width, scale=0.5), "bias": _randn(64)}

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    _compare(dtype, inputs, fused, causal_conv1d, ())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_mamba2_between_its_projections(dtype: torch.dtype, groups: int, length: int) -> None:
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    # Four heads a group: a norm over a single one would take out of the result what D and dt scale in all of it, and
    # leave as their gradients small differences of large sums, of which bf16 keeps no digits.
    heads, width, state, chunk = 4 * groups, 64, 64, 64
    inner, channels = heads * width, heads * width + 2 * groups * state
    inputs = {
        "zxBCdt": _randn(2, length, inner + channels + heads),
        "conv": _randn(channels, 4, scale=0.3),
        "conv_bias": _randn(channels, scale=0.1),
        "dt_bias": _randn(heads, scale=0.5) - 3,
        "A_log": torch.rand(heads, device="cuda").mul(15).add(1).log(),
        "D": 1 + _randn(heads, scale=0.1),
        "norm": 1 + _randn(inner, scale=0.1),
    }

    def fused(
        zxBCdt: Tensor, conv: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm: Tensor
    ) -> Tensor:
        return mamba_split_conv1d_scan_combined(
            zxBCdt,
            conv,
            conv_bias,
            dt_bias,
            -torch.exp(A_log),
            D=D,
            chunk_size=chunk,
            activation="silu",
            rmsnorm_weight=norm,
            rmsnorm_eps=1e-5,
            headdim=width,
            ngroups=groups,
            norm_before_gate=False,
        )

    def reference(
        zxBCdt: Tensor, conv: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, norm: Tensor
    ) -> Tensor:
        z, xBC, dt = zxBCdt.split([inner, channels, heads], dim=-1)
        x, B, C = causal_conv1d(xBC, conv, conv_bias).split([inner, groups * state, groups * state], dim=-1)
        y = ssd_scan(
            x.unflatten(-1, (heads, width)),
            F.softplus(dt + dt_bias),
            -torch.exp(A_log),
            B.unflatten(-1, (groups, state)),
            C.unflatten(-1, (groups, state)),
            D,
            chunk_size=chunk,
        )
        return gated_rms_norm(y.flatten(2), z, norm, group_size=inner // groups, eps=1e-5)

    def summed(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"dt_bias": gradients["zxBCdt"][..., -heads:]}

    _compare(dtype, inputs, fused, reference, ("dt_bias", "A_log"), summed)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("state", [16, 128])
@pytest.mark.parametrize("length", [*LENGTHS, 513, 2049])  # one more than a chunk of the convolution, and of the scan
def test_mamba1_between_its_projections(dtype: torch.dtype, state: int, length: int, alone: None) -> None:
    from megatron.core import parallel_state

    from hybrid.model.mamba1_fused import mix

    channels, rank = 96, 8
    group = parallel_state.get_tensor_and_context_parallel_group()
    inputs = {
        "xz": _randn(length, 3, 2 * channels),
        "conv": _randn(channels, 4, scale=0.3),
        "conv_bias": _randn(channels, scale=0.1),
        "x_weight": _randn(rank + 2 * state, channels, scale=0.1),
        "dt_weight": _randn(channels, rank, scale=0.3),
        "dt_bias": _randn(channels, scale=0.5) - 3,
        "A_log": torch.arange(1, state + 1, device="cuda").log().expand(channels, -1).contiguous(),
        "D": 1 + _randn(channels, scale=0.1),
    }

    def fused(A_log: Tensor, D: Tensor, **rest: Tensor) -> Tensor:
        return mix(**rest, A=-torch.exp(A_log), D=D, group=group)

    def reference(
        xz: Tensor,
        conv: Tensor,
        conv_bias: Tensor,
        x_weight: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        D: Tensor,
    ) -> Tensor:
        x, z = xz.transpose(0, 1).chunk(2, dim=-1)
        x = causal_conv1d(x, conv, conv_bias)
        dt, B, C = F.linear(x, x_weight).split([rank, state, state], dim=-1)
        delta = F.linear(dt, dt_weight)
        y = selective_scan(x, delta, -torch.exp(A_log), B, C, D, z, dt_bias, delta_softplus=True)
        return y.transpose(0, 1)

    _compare(dtype, inputs, fused, reference, ("dt_bias", "A_log", "D"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("positions", "channels"), [(1, 8), (65, 130), (1000, 256)])
def test_transposition(dtype: torch.dtype, positions: int, channels: int) -> None:
    from hybrid.model.transpose import channels_first, positions_first

    wide = _randn(positions, 3, channels + 5).to(dtype)
    tensor = wide[:, :, :channels]
    turned = channels_first(tensor)
    assert turned.is_contiguous() and turned.equal(tensor.permute(1, 2, 0))
    back = positions_first(turned)
    assert back.is_contiguous() and back.equal(tensor)

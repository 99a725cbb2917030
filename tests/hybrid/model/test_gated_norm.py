"""The fused gate and norm against torch's operations one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from hybrid.model.gated_norm import gated_rms_norm

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # float64, values of order one


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, z, weight."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 5, 12), (3, 5, 12), (12,)]
    x, z, weight = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x.requires_grad_(), z.requires_grad_(), weight.requires_grad_()


def definition(x: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    groups = (x * F.silu(z)).unflatten(-1, (-1, group_size))
    return (groups / (groups.square().mean(dim=-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight


@pytest.mark.parametrize("group_size", [1, 4, 12])
def test_output_and_gradients(group_size: int) -> None:
    inputs = make_inputs()
    expected = definition(*inputs, group_size, 1e-2)
    actual = gated_rms_norm(*inputs, group_size=group_size, eps=1e-2)
    torch.testing.assert_close(actual, expected, **ROUNDING)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), **ROUNDING
    )


def test_gradients_are_those_of_finite_differences() -> None:
    assert gradcheck(lambda *inputs: gated_rms_norm(*inputs, group_size=6, eps=1e-5), make_inputs())


def test_a_group_of_zeros_stays_zero() -> None:
    x, z, weight = make_inputs()
    y = gated_rms_norm(torch.zeros_like(x).requires_grad_(), z, weight, group_size=4, eps=1e-5)
    assert (y == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), (z, weight)))


def test_the_output_takes_the_layout_of_z() -> None:
    """z is a slice of Megatron's projection, which has positions before the batch; the scan has the batch first."""
    inputs = make_inputs()
    x, z, weight = inputs
    projection = torch.zeros(5, 3, 20, dtype=z.dtype)
    projection[:, :, 2:14] = z.detach().transpose(0, 1)
    z_slice = projection[:, :, 2:14].transpose(0, 1).requires_grad_()
    y = gated_rms_norm(x, z_slice, weight, group_size=4, eps=1e-5)
    assert y.transpose(0, 1).is_contiguous()
    expected = gated_rms_norm(*inputs, group_size=4, eps=1e-5)
    torch.testing.assert_close(y, expected, **ROUNDING)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, z_slice, weight), grad), torch.autograd.grad(expected, inputs, grad), **ROUNDING
    )


def test_bfloat16_is_computed_in_float32() -> None:
    x, z, weight = make_inputs(torch.bfloat16)
    y = gated_rms_norm(x, z, weight, group_size=4, eps=1e-5)
    exact = gated_rms_norm(x.float(), z.float(), weight.float(), group_size=4, eps=1e-5)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=0, atol=0)

"""The causal convolution against torch's own, written as causal-conv1d documents it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from hybrid.model.conv import causal_conv1d, causal_conv1d_step

BATCH, CHANNELS = 2, 6
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # float64 sums of w products of order one


def make_inputs(length: int, width: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(BATCH, length, CHANNELS), (CHANNELS, width), (CHANNELS,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    x, weight, bias = (tensor.requires_grad_() for tensor in tensors)
    return x, weight, bias


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, past: Tensor) -> Tensor:
    """`past` (b, c, w - 1) are the inputs before x."""
    y = F.conv1d(torch.cat([past, x.transpose(1, 2)], dim=2), weight.unsqueeze(1), bias, groups=x.shape[2])
    return (F.silu(y) if activation == "silu" else y).transpose(1, 2)


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(1, 10),
    width=st.integers(2, 5),
    activation=st.sampled_from(["silu", None]),
    with_bias=st.booleans(),
    with_state=st.booleans(),
)
def test_output_and_gradients(length: int, width: int, activation, with_bias: bool, with_state: bool) -> None:
    x, weight, bias = make_inputs(length, width)
    state = torch.ones(BATCH, CHANNELS, width, dtype=x.dtype).cumsum(dim=2).requires_grad_()
    expected = definition(
        x, weight, bias if with_bias else None, activation, state[:, :, 1:] if with_state else 0 * state[:, :, 1:]
    )
    actual = causal_conv1d(
        x,
        weight,
        bias if with_bias else None,
        activation=activation,
        initial_state=state if with_state else None,
    )
    torch.testing.assert_close(actual, expected, **ROUNDING)
    inputs = [x, weight] + [bias] * with_bias + [state] * with_state
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), **ROUNDING
    )


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(packed: bool) -> None:
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]) if packed else None
    assert gradcheck(lambda *inputs: causal_conv1d(*inputs, seq_idx=seq_idx), make_inputs(length=5))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_steps_are_the_convolution(length: int) -> None:
    x, weight, bias = make_inputs(length)
    state = torch.randn(BATCH, CHANNELS, 4, dtype=x.dtype)
    y, final_state = causal_conv1d(x, weight, bias, initial_state=state, return_final_state=True)
    for t in range(length):
        y_t, state = causal_conv1d_step(x[:, t], state, weight, bias)
        torch.testing.assert_close(y_t, y[:, t], **ROUNDING)
    torch.testing.assert_close(final_state, state, rtol=0, atol=0)


@pytest.mark.parametrize("first", [1, 2, 3, 7])
def test_two_parts_with_the_state_carried_over_are_the_whole(first: int) -> None:
    x, weight, bias = make_inputs(length=9)
    y, final_state = causal_conv1d(x, weight, bias, return_final_state=True)
    y_first, middle = causal_conv1d(x[:, :first], weight, bias, return_final_state=True)
    y_second, end = causal_conv1d(x[:, first:], weight, bias, initial_state=middle, return_final_state=True)
    torch.testing.assert_close(torch.cat([y_first, y_second], dim=1), y, **ROUNDING)
    torch.testing.assert_close(end, final_state, rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[3, 5, 1, 2], [1, 1, 1, 8]])
def test_packed_sequences_do_not_see_each_other(lengths: list[int]) -> None:
    x, weight, bias = make_inputs(sum(lengths))
    # The first number comes back at the end: another sequence all the same.
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 2, 0]), torch.tensor(lengths)).expand(BATCH, -1)
    y = causal_conv1d(x, weight, bias, seq_idx=seq_idx)
    for part, alone in zip(y.split(lengths, dim=1), x.split(lengths, dim=1), strict=True):
        torch.testing.assert_close(part, causal_conv1d(alone, weight, bias), **ROUNDING)


def test_the_initial_state_of_packed_sequences_belongs_to_the_first() -> None:
    x, weight, bias = make_inputs(length=7)
    state = torch.randn(BATCH, CHANNELS, 4, dtype=x.dtype)
    seq_idx = torch.tensor([0, 0, 1, 1, 1, 1, 1]).expand(BATCH, -1)
    y = causal_conv1d(x, weight, bias, initial_state=state, seq_idx=seq_idx)
    torch.testing.assert_close(y[:, :2], causal_conv1d(x[:, :2], weight, bias, initial_state=state), **ROUNDING)
    torch.testing.assert_close(y[:, 2:], causal_conv1d(x[:, 2:], weight, bias), **ROUNDING)


def test_float32_and_bfloat16() -> None:
    """A sum of w + 1 terms loses at most w + 1 units in the last place of the sum of absolute values; silu's slope is
    below 1.1 and its own rounding a unit more. bfloat16 is computed in float32 and rounded once.
    """
    x, weight, bias = (tensor.detach() for tensor in make_inputs(length=50, dtype=torch.float32))
    y = causal_conv1d(x, weight, bias)
    exact = causal_conv1d(x.double(), weight.double(), bias.double())
    size = causal_conv1d(x.double().abs(), weight.double().abs(), bias.double().abs(), activation=None)
    assert ((y.double() - exact).abs() <= 7 * torch.finfo(torch.float32).eps * size).all()

    rounded = [tensor.bfloat16() for tensor in (x, weight, bias)]
    y = causal_conv1d(*rounded)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, causal_conv1d(*(tensor.float() for tensor in rounded)).bfloat16(), rtol=0, atol=0)


def test_x_may_be_a_slice_of_a_length_first_projection() -> None:
    x, weight, bias = make_inputs(length=9)
    projection = torch.randn(9, BATCH, CHANNELS + 5, dtype=x.dtype)
    projection[:, :, 2 : 2 + CHANNELS] = x.detach().transpose(0, 1)
    y = causal_conv1d(projection.transpose(0, 1)[:, :, 2 : 2 + CHANNELS], weight, bias)
    torch.testing.assert_close(y, causal_conv1d(x, weight, bias), **ROUNDING)

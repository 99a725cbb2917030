"""The chunked selective scan of Mamba-1 against its definition, one position at a time in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from hybrid.model import selective_scan as module
from hybrid.model.selective_scan import selective_scan, selective_scan_recurrence, selective_scan_step

BATCH, CHANNELS, STATE = 3, 4, 5
ALONG = ("u", "delta", "B", "C", "z")  # what has a value at every position

# float64 against float64: only rounding differs, and the values are of order one (gradients of A, sums over all
# positions, of order ten).
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def make_inputs(length: int, dtype: torch.dtype = torch.float64, decay: float = 1.0) -> dict[str, Tensor]:
    """All inputs of the scan; delta A of a position lies between -2 and 0 times `decay`."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "u": normal(BATCH, length, CHANNELS),
        "delta": uniform(BATCH, length, CHANNELS) + 0.01,
        "A": -2 * decay * uniform(CHANNELS, STATE),
        "B": normal(BATCH, length, STATE),
        "C": normal(BATCH, length, STATE),
        "D": normal(CHANNELS),
        "z": normal(BATCH, length, CHANNELS),
        "delta_bias": normal(CHANNELS),
        "initial_state": normal(BATCH, CHANNELS, STATE),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def scan(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    return selective_scan(**inputs, delta_softplus="delta_bias" in inputs, return_final_state=True, **options)


def definition(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    return selective_scan_recurrence(**inputs, delta_softplus="delta_bias" in inputs, **options)


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of the outputs."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), weights), strict=True))


def cut(inputs: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """The same inputs for a part of the positions, without an initial state."""
    return {
        name: tensor[:, part] if name in ALONG else tensor for name, tensor in inputs.items() if name != "initial_state"
    }


def packed_index(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(BATCH, -1)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 15),
    rows=st.integers(1, BATCH),
    positions=st.integers(1, 16),
    left_out=st.sets(st.sampled_from(["D", "z", "delta_bias", "initial_state"])),
    packed=st.booleans(),
)
def test_scan_and_its_gradients_are_those_of_the_recurrence(
    length: int, rows: int, positions: int, left_out: set[str], packed: bool
) -> None:
    """However many rows and positions a chunk has."""
    inputs = {name: tensor for name, tensor in make_inputs(length).items() if name not in left_out}
    seq_idx = torch.arange(length).div(4, rounding_mode="floor").expand(BATCH, -1) if packed else None
    expected = definition(inputs, seq_idx=seq_idx)
    with pytest.MonkeyPatch.context() as patch:
        step = CHANNELS * STATE // torch.get_num_threads()
        patch.setattr(module, "_STEP_ELEMENTS", rows * step)
        patch.setattr(module, "_CHUNK_ELEMENTS", rows * positions * step)
        actual = scan(inputs, seq_idx=seq_idx)
        torch.testing.assert_close(actual, expected, **ROUNDING)
        torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs), **ROUNDING)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = make_inputs(length=4)
    assert gradcheck(lambda *tensors: scan(dict(zip(inputs, tensors, strict=True))), tuple(inputs.values()))


def test_gradients_when_only_the_final_state_is_used() -> None:
    inputs = make_inputs(length=5)
    _, expected = definition(inputs)
    _, actual = scan(inputs)
    for name in ("u", "delta", "A", "B", "delta_bias", "initial_state"):
        grads = [torch.autograd.grad(out.square().sum(), inputs[name], retain_graph=True) for out in (actual, expected)]
        torch.testing.assert_close(grads[0], grads[1], **ROUNDING, msg=name)


def test_two_halves_with_the_state_carried_over_are_the_whole() -> None:
    inputs = make_inputs(length=11)
    y, final_state = scan(inputs)
    y_first, middle = scan(cut(inputs, slice(0, 4)) | {"initial_state": inputs["initial_state"]})
    y_second, end = scan(cut(inputs, slice(4, 11)) | {"initial_state": middle})
    torch.testing.assert_close(torch.cat([y_first, y_second], dim=1), y, **ROUNDING)
    torch.testing.assert_close(end, final_state, **ROUNDING)


def test_steps_are_the_scan() -> None:
    inputs = make_inputs(length=6)
    y, final_state = scan(inputs)
    state = inputs["initial_state"]
    for t in range(6):
        position = {name: tensor[:, t] if name in ALONG else tensor for name, tensor in inputs.items()}
        del position["initial_state"]
        y_t, state = selective_scan_step(state, **position, delta_softplus=True)
        torch.testing.assert_close(y_t, y[:, t], **ROUNDING)
    torch.testing.assert_close(state, final_state, **ROUNDING)


def test_packed_sequences_do_not_see_each_other() -> None:
    lengths = [3, 1, 7, 2]
    inputs = make_inputs(sum(lengths))
    del inputs["initial_state"]
    y, final_state = scan(inputs, seq_idx=packed_index(lengths))
    start = 0
    for length in lengths:
        alone, state = scan(cut(inputs, slice(start, start + length)))
        torch.testing.assert_close(y[:, start : start + length], alone, **ROUNDING)
        start += length
    torch.testing.assert_close(final_state, state, **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 50.0, 1e20])
def test_decays_without_end_and_without_effect(decay: float, dtype: torch.dtype) -> None:
    """delta A of 0, and down to -2e20, where exp underflows."""
    inputs = make_inputs(length=20, dtype=dtype, decay=decay)
    actual = scan(inputs)
    assert all(tensor.isfinite().all() for tensor in (*actual, *gradients(actual, inputs).values()))
    expected = definition({name: tensor.double() for name, tensor in inputs.items()})
    torch.testing.assert_close(tuple(out.double() for out in actual), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", [0.1, 1.0, 10.0])
def test_float32_stays_within_its_rounding(decay: float) -> None:
    """A state is a sum in which every term has gone through up to l products, each of which loses at most a unit in the
    last place; delta itself carries that of its softplus, which counts as often as delta A is large. Sums over states
    add n, and the gradients go the same way back: their norm is held to the same bound, twice.
    """
    length = 40
    inputs = {name: value for name, value in make_inputs(length, torch.float32, decay).items() if name != "delta_bias"}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    size = {name: -tensor.abs() if name == "A" else tensor.abs() for name, tensor in exact.items()}
    size["z"] = torch.full_like(exact["z"], 20.0)  # silu(20) = 20 is above |silu(z)| and its rounding
    bound = torch.finfo(torch.float32).eps * (length + STATE + 2 * decay)
    actual, expected = scan(inputs), definition(exact)
    for out, exact_out, out_size in zip(actual, expected, definition(size), strict=True):
        assert ((out.double() - exact_out).abs() <= bound * out_size).all()
    actual_grads, exact_grads = gradients(actual, inputs), gradients(expected, exact)
    for name, exact_grad in exact_grads.items():
        assert (actual_grads[name].double() - exact_grad).norm() <= 2 * bound * exact_grad.norm(), name


def test_bfloat16_is_computed_in_float32() -> None:
    inputs = make_inputs(length=9, dtype=torch.bfloat16)
    y, final_state = scan(inputs)
    y_float, state_float = scan({name: tensor.float() for name, tensor in inputs.items()})
    assert y.dtype == torch.bfloat16 and final_state.dtype == torch.float32
    torch.testing.assert_close(y, y_float.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(final_state, state_float, rtol=0, atol=0)


def test_agrees_with_the_selective_scan_of_mamba_ssm_as_it_is_documented() -> None:
    """`selective_scan_ref` of mamba-ssm in its own layout, (b, d, l), written out with sums over explicit products."""
    inputs = {name: tensor.detach() for name, tensor in make_inputs(length=8).items() if name != "initial_state"}
    u, z = inputs["u"].mT, inputs["z"].mT
    delta = F.softplus(inputs["delta"].mT + inputs["delta_bias"][:, None])
    total = delta.cumsum(dim=2)
    # y[t] = sum over s <= t of C[t] . exp(A (total[t] - total[s])) B[s] delta[s] u[s], all at once.
    weights = torch.exp(torch.einsum("dn,bdts->bdnts", inputs["A"], total[..., :, None] - total[..., None, :])).tril()
    y = torch.einsum("btn,bdnts,bsn,bds->bdt", inputs["C"], weights, inputs["B"], delta * u)
    y = (y + u * inputs["D"][:, None]) * F.silu(z)
    torch.testing.assert_close(scan(inputs)[0], y.mT, **ROUNDING)

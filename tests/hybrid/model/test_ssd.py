"""The chunked scan of Mamba-2 against its definition, one position at a time in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from hybrid.model import ssd
from hybrid.model.ssd import ssd_recurrence, ssd_scan, ssd_step

BATCH, HEADS, WIDTH, STATE = 2, 4, 3, 5
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")

# float64 against float64: only rounding differs, and the values are of order one (gradients of A, sums over all
# positions, of order ten).
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def make_inputs(
    length: int, groups: int = 1, dtype: torch.dtype = torch.float64, decay: float = 1.0, wide_D: bool = False
) -> dict[str, Tensor]:
    """Inputs of the scan; dt A of a position lies between -2 and 0 times `decay`."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "x": normal(BATCH, length, HEADS, WIDTH),
        "dt": uniform(BATCH, length, HEADS) + 0.01,
        "A": -2 * decay * uniform(HEADS),
        "B": normal(BATCH, length, groups, STATE),
        "C": normal(BATCH, length, groups, STATE),
        "D": normal(HEADS, WIDTH) if wide_D else normal(HEADS),
        "initial_state": normal(BATCH, HEADS, WIDTH, STATE),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def scan(inputs: dict[str, Tensor], chunk_size: int, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return ssd_scan(**inputs, chunk_size=chunk_size, seq_idx=seq_idx, return_final_state=True)  # type: ignore[arg-type]


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of the outputs."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), weights), strict=True))


def cut(inputs: dict[str, Tensor], part: slice, row: slice = slice(None)) -> dict[str, Tensor]:
    """The same inputs for a part of the positions (and of the batch), without an initial state."""
    along = {name: inputs[name][row, part] for name in ("x", "dt", "B", "C")}
    return along | {name: inputs[name] for name in ("A", "D")}


def packed_index(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(BATCH, -1)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 20),
    chunk_size=st.integers(1, 24),
    groups=st.sampled_from([1, 2, 4]),
    wide_D=st.booleans(),
    packed=st.booleans(),
)
def test_scan_and_its_gradients_are_those_of_the_recurrence(
    length: int, chunk_size: int, groups: int, wide_D: bool, packed: bool
) -> None:
    inputs = make_inputs(length, groups, wide_D=wide_D)
    seq_idx = torch.arange(length).div(7, rounding_mode="floor").expand(BATCH, -1) if packed else None
    expected = ssd_recurrence(**inputs, seq_idx=seq_idx)  # type: ignore[arg-type]
    actual = scan(inputs, chunk_size, seq_idx)
    torch.testing.assert_close(actual, expected, **ROUNDING)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs), **ROUNDING)


@pytest.mark.parametrize("positions", [4, 12, 20, 40, 80])
def test_blocks_of_a_long_input_are_the_whole(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU the scan takes so many positions at a time, of one row or of several."""
    inputs = make_inputs(length=40, groups=2)
    seq_idx = packed_index([9, 15, 3, 13])
    whole = scan(inputs, 4, seq_idx)
    whole_gradients = gradients(whole, inputs)
    monkeypatch.setattr(ssd, "_BLOCK_ELEMENTS", positions * HEADS * WIDTH)
    blocks = scan(inputs, 4, seq_idx)
    torch.testing.assert_close(blocks, whole, **ROUNDING)
    torch.testing.assert_close(gradients(blocks, inputs), whole_gradients, **ROUNDING)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = make_inputs(length=5, groups=2)
    assert gradcheck(
        lambda *tensors: scan(dict(zip(NAMES, tensors, strict=True)), chunk_size=2), tuple(inputs.values())
    )


def test_without_D_and_initial_state() -> None:
    inputs = make_inputs(length=9)
    del inputs["D"], inputs["initial_state"]
    expected, actual = ssd_recurrence(**inputs), scan(inputs, chunk_size=4)
    torch.testing.assert_close(actual, expected, **ROUNDING)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs), **ROUNDING)


def test_gradients_when_only_the_final_state_is_used() -> None:
    inputs = make_inputs(length=9)
    del inputs["C"], inputs["D"]  # the final state does not depend on them
    rest = make_inputs(length=9)
    _, expected = ssd_recurrence(**inputs, C=rest["C"], D=rest["D"])
    _, actual = scan(inputs | {"C": rest["C"], "D": rest["D"]}, chunk_size=4)
    for name, tensor in inputs.items():
        grads = [torch.autograd.grad(out.square().sum(), tensor, retain_graph=True)[0] for out in (actual, expected)]
        torch.testing.assert_close(grads[0], grads[1], **ROUNDING, msg=name)


def test_zero_C_still_receives_a_gradient() -> None:
    inputs = make_inputs(length=6)
    inputs["C"] = torch.zeros_like(inputs["C"]).requires_grad_()
    expected = ssd_recurrence(**inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(gradients(scan(inputs, chunk_size=4), inputs), gradients(expected, inputs), **ROUNDING)


def test_two_halves_with_the_state_carried_over_are_the_whole() -> None:
    inputs = make_inputs(length=19, groups=2)
    y, final_state = scan(inputs, chunk_size=4)
    y_first, middle = scan(cut(inputs, slice(0, 7)) | {"initial_state": inputs["initial_state"]}, chunk_size=4)
    y_second, end = scan(cut(inputs, slice(7, 19)) | {"initial_state": middle}, chunk_size=4)
    torch.testing.assert_close(torch.cat([y_first, y_second], dim=1), y, **ROUNDING)
    torch.testing.assert_close(end, final_state, **ROUNDING)


def test_steps_are_the_scan() -> None:
    inputs = make_inputs(length=6, groups=2)
    y, final_state = scan(inputs, chunk_size=4)
    state = inputs["initial_state"]
    for t in range(6):
        position = {name: tensor[:, t] for name, tensor in cut(inputs, slice(None)).items() if name not in "AD"}
        y_t, state = ssd_step(state, **position, A=inputs["A"], D=inputs["D"])
        torch.testing.assert_close(y_t, y[:, t], **ROUNDING)
    torch.testing.assert_close(state, final_state, **ROUNDING)


@pytest.mark.parametrize("lengths", [[3, 8, 1, 7], [4, 4, 4, 4], [1, 15]])
def test_packed_sequences_do_not_see_each_other(lengths: list[int]) -> None:
    inputs = make_inputs(sum(lengths), groups=2)
    del inputs["initial_state"]
    y, final_state = scan(inputs, chunk_size=4, seq_idx=packed_index(lengths))
    start = 0
    for length in lengths:
        alone, state = scan(cut(inputs, slice(start, start + length)), chunk_size=4)
        torch.testing.assert_close(y[:, start : start + length], alone, **ROUNDING)
        start += length
    torch.testing.assert_close(final_state, state, **ROUNDING)


def test_an_index_that_comes_back_is_another_sequence() -> None:
    inputs = make_inputs(length=12)
    seq_idx = torch.tensor([0] * 3 + [1] * 3 + [0] * 6).expand(BATCH, -1)
    y, _ = scan(inputs, chunk_size=12, seq_idx=seq_idx)
    alone, _ = scan(cut(inputs, slice(6, 12)), chunk_size=12)
    torch.testing.assert_close(y[:, 6:], alone, **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [50.0, 1e4, 1e20])
def test_decays_that_vanish_leave_finite_numbers(decay: float, dtype: torch.dtype) -> None:
    """dt A down to -2e20: exp underflows forwards, and would overflow above the diagonal."""
    inputs = make_inputs(length=40, dtype=dtype, decay=decay)
    actual = scan(inputs, chunk_size=16)
    grads = gradients(actual, inputs)
    assert all(tensor.isfinite().all() for tensor in (*actual, *grads.values()))
    # What is left: the position's own share, and a neighbour's where dt is small.
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    expected = ssd_recurrence(**exact)  # type: ignore[arg-type]
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-4, atol=1e-4)


def test_no_decay_keeps_everything() -> None:
    inputs = make_inputs(length=10, decay=0.0)
    torch.testing.assert_close(scan(inputs, chunk_size=4), ssd_recurrence(**inputs), **ROUNDING)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [0.1, 1.0, 10.0])
def test_float32_stays_within_its_rounding(decay: float) -> None:
    """Every term of y carries at most the rounding of its products and sums, and of its exponent.

    A sum over n states and q positions loses at most n + q units in the last place of the sum of absolute values; an
    exponent is a difference of sums of up to q steps, whose own rounding is q units of their size. Gradients are sums
    of the same kind: the bound is applied to their norm.
    """
    length, chunk_size = 70, 32
    inputs = make_inputs(length, groups=2, dtype=torch.float32, decay=decay)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    absolute = {name: -tensor.abs() if name == "A" else tensor.abs() for name, tensor in exact.items()}
    actual, expected = scan(inputs, chunk_size), ssd_recurrence(**exact)  # type: ignore[arg-type]
    largest_sum = min(44.0, 2 * decay * chunk_size)
    bound = torch.finfo(torch.float32).eps * (STATE + 2 * chunk_size + largest_sum)
    for out, exact_out, size in zip(actual, expected, ssd_recurrence(**absolute), strict=True):  # type: ignore[arg-type]
        assert ((out.double() - exact_out).abs() <= bound * size).all()
    actual_grads, exact_grads = gradients(actual, inputs), gradients(expected, exact)
    for name, exact_grad in exact_grads.items():
        assert (actual_grads[name].double() - exact_grad).norm() <= bound * exact_grad.norm(), name


def test_bfloat16_is_computed_in_float32() -> None:
    inputs = make_inputs(length=20, dtype=torch.bfloat16)
    y, final_state = scan(inputs, chunk_size=8)
    y_float, state_float = scan({name: tensor.float() for name, tensor in inputs.items()}, chunk_size=8)
    assert y.dtype == torch.bfloat16 and final_state.dtype == torch.float32
    torch.testing.assert_close(y, y_float.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(final_state, state_float, rtol=0, atol=0)


def test_inputs_may_be_views_of_a_longer_first_layout() -> None:
    """Megatron's layers hand (l, b, ...) on; x, B and C are slices of one projection."""
    inputs = make_inputs(length=9, groups=2)
    strided = {
        name: tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        if name in ("x", "dt", "B", "C")
        else tensor
        for name, tensor in inputs.items()
    }
    actual, expected = scan(strided, chunk_size=4), scan(inputs, chunk_size=4)
    torch.testing.assert_close(actual, expected, **ROUNDING)
    torch.testing.assert_close(gradients(actual, strided), gradients(expected, inputs), **ROUNDING)

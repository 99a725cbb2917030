"""The kernels of a decoding step against their PyTorch forms in float32, and decoding in graphs against without.

Without a CUDA device the kernels run in Triton's interpreter, in float32.
In float32 a sum of some hundred terms is off by about 1e-6 of its size; in bf16 results are rounded to 8 bits.
"""

import os
import subprocess
import sys

import pytest
import torch

from hybrid.generation import ops
from tests import toy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported
DEVICE = "cpu" if INTERPRETED else "cuda"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
TYPES = [torch.float32] if INTERPRETED else list(LIMITS)


@pytest.fixture(autouse=True)
def somewhere(request: pytest.FixtureRequest) -> None:
    """Skip what has neither a CUDA device nor the interpreter."""
    runs_others = request.node.name == "test_all_of_these_in_the_interpreter"
    if runs_others == (INTERPRETED or torch.cuda.is_available()):
        pytest.skip(
            "run by the other" if runs_others else "there is no CUDA device; run by the test of the interpreter"
        )


def test_all_of_these_in_the_interpreter() -> None:
    # Without what other tests need: starting would take longer than all of these.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "--noconftest", __file__]
    done = subprocess.run(command, env=environment, cwd=toy.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _close(ours: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    apart = (ours.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm()
    assert apart <= limit


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "width", "groups", "size"), [(4, 16, 2, 16), (6, 24, 3, 20), (8, 64, 8, 128)])
def test_the_recurrence(dtype: torch.dtype, heads: int, width: int, groups: int, size: int) -> None:
    from hybrid.generation import kernels

    state = _random(3, heads, width, size, dtype=dtype)
    wide = _random(3, heads * width + 2 * groups * size, dtype=dtype, seed=1)  # rows that lie apart
    x, B, C = wide.split([heads * width, groups * size, groups * size], dim=-1)
    x, B, C = x.unflatten(-1, (heads, width)), B.unflatten(-1, (groups, size)), C.unflatten(-1, (groups, size))
    dt, bias = _random(3, heads, dtype=dtype, seed=2), _random(heads, seed=3)
    A, D = -_random(heads, seed=4).abs(), _random(heads, seed=5)
    expected_state = state.float().cpu().clone()
    given = [t.float().cpu() for t in (x, dt, bias, A, B, C, D)]
    expected = ops.ssm_step(expected_state, *given)
    _close(kernels.ssm_step(state, x, dt, bias, A, B, C, D), expected, LIMITS[dtype])
    _close(state, expected_state, LIMITS[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("heads", "width", "groups", "size", "length"), [(4, 16, 2, 16, 9), (6, 24, 3, 20, 150), (8, 64, 8, 128, 70)]
)
def test_the_recurrence_over_pieces(
    dtype: torch.dtype, heads: int, width: int, groups: int, size: int, length: int
) -> None:
    from hybrid.generation import scan_kernels

    state = _random(5, heads, width, size, dtype=dtype)
    state[1] = torch.nan  # of a sequence that has ended; the next one in its place has seen nothing
    channels = [heads * width, groups * size, groups * size, heads]
    x, B, C, dt = _random(3, length, sum(channels), dtype=dtype, seed=1).split(channels, dim=-1)
    x, B, C = x.unflatten(-1, (heads, width)), B.unflatten(-1, (groups, size)), C.unflatten(-1, (groups, size))
    bias, A, D = _random(heads, seed=3), -_random(heads, seed=4).abs(), _random(heads, seed=5)
    rows, starts, lengths = torch.tensor([[4, 3, length], [1, 0, min(length, 67)], [0, 64, 1]]).unbind(1)
    expected_state = state.float().cpu().clone()
    given = [t.float().cpu() for t in (x, dt, bias, A, B, C, D)]
    expected = ops.scan(expected_state, rows, starts, lengths, *given, chunk_size=64)
    told = [t.to(DEVICE) for t in (rows, starts, lengths)]
    found = scan_kernels.scan(state, told[0], told[1], told[2], x, dt, bias, A, B, C, D)
    for index, count in enumerate(lengths.tolist()):
        _close(found[index, :count], expected[index, :count], LIMITS[dtype])
    for row in range(5):
        _close(state[row], expected_state[row], LIMITS[dtype])


@pytest.mark.parametrize("dtype", TYPES)
def test_the_convolution(dtype: torch.dtype) -> None:
    from hybrid.generation import kernels

    x, state = _random(3, 340, dtype=dtype)[:, 20:], _random(3, 4, 320, dtype=dtype, seed=1)
    weight, bias = _random(4, 320, dtype=dtype, seed=2), _random(320, dtype=dtype, seed=3)
    expected_state = state.float().cpu().clone()
    expected = ops.conv_step(x.float().cpu(), expected_state, weight.float().cpu(), bias.float().cpu())
    _close(kernels.conv_step(x, state, weight, bias), expected, LIMITS[dtype])
    assert torch.equal(state.float().cpu(), expected_state)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gated_norm(dtype: torch.dtype) -> None:
    from hybrid.generation import kernels

    y, z, weight = _random(3, 96, dtype=dtype), _random(3, 200, dtype=dtype, seed=1)[:, :96], _random(96, dtype=dtype)
    expected = ops.gated_norm(y.float().cpu(), z.float().cpu(), weight.float().cpu(), 4, 1e-5)
    _close(kernels.gated_norm(y, z, weight, 4, 1e-5), expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 16), (6, 2, 24), (2, 2, 64)])
def test_attention(dtype: torch.dtype, heads: int, groups: int, width: int) -> None:
    from hybrid.generation import kernels

    query = _random(3, heads, width, dtype=dtype)
    key, value = (
        _random(3, groups, 700, width, dtype=dtype, seed=1),
        _random(3, groups, 700, width, dtype=dtype, seed=2),
    )
    lengths = torch.tensor([1, 37, 600])
    given = [t.float().cpu() for t in (query, key, value)]
    expected = ops.attend(*given, lengths.tolist(), lengths)
    _close(kernels.attend(query, key, value, lengths.to(DEVICE)), expected, LIMITS[dtype])
    # One sequence's keys are shared by more programs than three sequences'; as many as there are for a whole batch
    # leave it to one.
    for row, length in enumerate(lengths.tolist()):
        alone = [t[row : row + 1] for t in (query, key, value)]
        _close(kernels.attend(*alone, lengths[row : row + 1].to(DEVICE)), expected[row : row + 1], LIMITS[dtype])
        assert length == lengths[row]
    many = [t.repeat(60, *[1] * (t.ndim - 1)) for t in (query, key[:, :, :40], value[:, :, :40])]
    short = lengths.clamp(max=40).repeat(60)
    expected = ops.attend(*[t.float().cpu() for t in many], short.tolist(), short)
    if not INTERPRETED:  # which takes a while for a program
        _close(kernels.attend(*many, short.to(DEVICE)), expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "groups", "width", "length"), [(4, 2, 16, 9), (2, 1, 24, 40)])
def test_attention_of_pieces(dtype: torch.dtype, heads: int, groups: int, width: int, length: int) -> None:
    from hybrid.generation import kernels

    query = _random(3, length, heads, width, dtype=dtype)
    key, value = (_random(5, groups, 70, width, dtype=dtype, seed=seed) for seed in (1, 2))
    rows, starts = torch.tensor([[4, 0], [0, 30], [2, 7]]).unbind(1)  # numbers that lie apart
    expected = ops.attend_piece(*[t.float().cpu() for t in (query, key, value)], rows, starts)
    _close(kernels.attend_piece(query, key, value, rows.to(DEVICE), starts.to(DEVICE)), expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(4, 12), (6, 40, 25)])
def test_states_are_taken_from_their_rows_and_put_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from hybrid.generation import kernels

    state = _random(5, *shape, dtype=dtype)
    state[1] = torch.nan  # of a sequence that has ended; the next one in its place has seen nothing
    given = torch.tensor([[3, 7, 0], [1, 0, 0], [4, 1, 0]], device=DEVICE)
    rows, starts = given[:, 0], given[:, 1]
    taken = kernels.taken(state, rows, starts)
    assert torch.equal(taken.cpu(), ops.taken(state.cpu(), rows.cpu(), starts.cpu()))
    assert not taken[1].any()
    after, expected = _random(3, *shape, seed=1), state.cpu()
    ops.put(after.cpu(), expected, rows.cpu())
    kernels.put(after, state, rows)
    assert torch.equal(state.cpu(), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_new_keys_and_values_go_where_they_belong(dtype: torch.dtype) -> None:
    from hybrid.generation import kernels

    qkv = _random(3, 2, 5, 24, dtype=dtype)  # per key-value head its queries, key, value
    key, value = _random(3, 2, 9, 24, dtype=dtype, seed=1), _random(3, 2, 9, 24, dtype=dtype, seed=2)
    positions = torch.tensor([0, 8, 4], device=DEVICE)
    expected = [key.cpu().clone(), value.cpu().clone()]
    ops.keep(qkv[:, :, 3].cpu(), qkv[:, :, 4].cpu(), *expected, positions.cpu())
    kernels.keep(qkv[:, :, 3], qkv[:, :, 4], key, value, positions)
    assert torch.equal(key.cpu(), expected[0]) and torch.equal(value.cpu(), expected[1])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ["", "gelu", "squared_relu"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 2048), (37, 1500), (8, 24)])
def test_a_product_with_one_row(dtype: torch.dtype, activation: str, rows: int, columns: int) -> None:
    from hybrid.generation import kernels
    from hybrid.generation.weights import Linear

    x, weight = _random(1, columns, dtype=dtype), _random(rows, columns, dtype=dtype, seed=1) / columns**0.5
    for bias in (None, _random(rows, dtype=dtype, seed=2)):
        wide = Linear(weight.float().cpu(), None if bias is None else bias.float().cpu())
        expected = ops.activated(wide, x.float().cpu(), activation)
        _close(kernels.matvec(x, weight, bias, activation), expected, LIMITS[dtype])


@pytest.mark.parametrize("dtype", TYPES)
def test_sum_and_norm(dtype: torch.dtype) -> None:
    from hybrid.generation import kernels
    from hybrid.generation.weights import Norm

    hidden, mixed, weight = _random(3, 96, dtype=dtype), _random(3, 96, dtype=dtype, seed=1), _random(96, dtype=dtype)
    wide = [t.float().cpu() for t in (hidden, mixed, weight)]
    expected = ops.add_norm(wide[0], wide[1], Norm(wide[2], None, 1e-5))
    for found, right in zip(kernels.add_norm(hidden, mixed, weight, 1e-5), expected, strict=True):
        _close(found, right, LIMITS[dtype])

"""Reading a text in pieces and positions, with carried state, is reading it whole: against megatron-core's forward."""

import pytest
import torch
import torch.nn.functional as F

from hybrid.generation import forward, ops
from hybrid.generation.runner import Runner
from tests.hybrid.generation.conftest import Toy

VOCABULARY = 257


def read_in_pieces(runner: Runner, row: int, tokens: list[int], pieces: list[int]) -> torch.Tensor:
    """Logits of every position, read into a row piece by piece."""
    runner.reset(row)
    logits, read = [], 0
    for length in pieces:
        logits.append(runner.read([row], [tokens[read : read + length]], every=True)[0])
        read += length
    return torch.cat(logits)


def test_pieces_give_the_logits_of_the_whole(toy_model: Toy) -> None:
    # Two ways of computing the same float32 sums of some hundred terms; logits here are of size 1 to 10. The rounding
    # of one sum is about 1e-6 of it, and a few layers add up.
    tokens = torch.randint(VOCABULARY, (50,), generator=torch.Generator().manual_seed(0))
    expected = toy_model.whole(tokens[None])[0]
    assert expected.abs().max() > 0.5
    runner = toy_model.runner()
    row = runner.reading_rows[0]
    for pieces in ([50], [1] * 50, [20, 1, 1, 17, 11], [3, 47]):
        logits = read_in_pieces(runner, row, tokens.tolist(), pieces)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_decoding_rows_together_gives_the_logits_of_each_whole(toy_model: Toy) -> None:
    """Three sequences of different lengths, read apart and decoded together."""
    tokens = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = toy_model.whole(tokens)
    runner = toy_model.runner()
    reading, prompts = runner.reading_rows[0], [5, 17, 30]
    for row, length in enumerate(prompts):
        read_in_pieces(runner, reading, tokens[row, :length].tolist(), [length])
        runner.copy(reading, row)
    for step in range(10):
        logits = runner.step([int(tokens[row, length + step]) for row, length in enumerate(prompts)])
        rows = torch.stack([expected[row, length + step] for row, length in enumerate(prompts)])
        torch.testing.assert_close(logits, rows, atol=2e-4, rtol=1e-4)


def test_several_prompts_are_read_at_once(toy_model: Toy) -> None:
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(2))
    expected = toy_model.whole(tokens)
    runner = toy_model.runner()
    rows = [runner.reading_rows[2], runner.reading_rows[0]]
    for row in rows:
        runner.reset(row)
    pieces = [runner.read(rows, part.tolist(), every=True) for part in tokens.split([10, 14], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=2e-4, rtol=1e-4)


def test_prompts_of_different_lengths_are_padded_and_read_at_once(toy_model: Toy) -> None:
    """As it is done on CUDA: pieces of 3 to 16 tokens in one call, of prompts that are not as far."""
    if not forward.pads(toy_model.weights):
        pytest.skip("has layers that are read without padding")
    tokens = torch.randint(VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(5))
    expected = toy_model.whole(tokens)
    runner = toy_model.runner(max_length=40)
    runner.pads = True
    read = dict.fromkeys(runner.reading_rows[:4], 0)
    for row in read:
        runner.reset(row)
    for lengths in ([3, 16, 9, 1], [16, 0, 5, 0], [2, 16, 16, 1], [16, 8, 10, 2], [3, 0, 0, 0]):
        pieces = [(i, row, length) for i, (row, length) in enumerate(zip(read, lengths, strict=True)) if length]
        given = [tokens[i, read[row] : read[row] + length].tolist() for i, row, length in pieces]
        logits = runner.read([row for _, row, _ in pieces], given)
        for (i, row, length), found in zip(pieces, logits, strict=True):
            read[row] += length
            torch.testing.assert_close(found[0], expected[i, read[row] - 1], atol=2e-4, rtol=1e-4)
    assert [*read.values()] == [40, 40, 40, 4]


def test_a_row_used_before_starts_from_nothing(toy_model: Toy) -> None:
    first, second = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3)).tolist()
    runner = toy_model.runner()
    row = runner.reading_rows[0]
    fresh = read_in_pieces(runner, row, second, [12, 8])
    read_in_pieces(runner, row, first, [20])
    assert torch.equal(read_in_pieces(runner, row, second, [12, 8]), fresh)


def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it(toy_model: Toy) -> None:
    """Bit by bit: logits of one sequence alone, and among others in any row."""
    tokens = torch.randint(VOCABULARY, (7, 30), generator=torch.Generator().manual_seed(4)).tolist()
    runner = toy_model.runner(slots=8)
    reading = runner.reading_rows[0]

    def decode(order: list[int]) -> dict[int, torch.Tensor]:
        for row, which in enumerate(order):
            read_in_pieces(runner, reading, tokens[which][: 10 + which], [10 + which])
            runner.copy(reading, row)
        steps = [runner.step([tokens[which][20 + step] for which in order]) for step in range(4)]
        return {which: torch.stack([logits[row] for logits in steps]) for row, which in enumerate(order)}

    together = decode([0, 1, 2, 3, 4, 5, 6])
    for order in ([0], [6], [3, 0], [5, 2, 6], [6, 5, 4, 3, 2], [1, 0, 4, 2, 3, 6]):
        for which, logits in decode(order).items():
            assert torch.equal(logits, together[which]), (order, which)


@pytest.mark.parametrize("width", [7, 8, 20, 32, 72, 96])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(ops.silu, F.silu), (ops.gelu, F.gelu), (ops.softplus, F.softplus)], ids=["silu", "gelu", "sp"]
)
def test_activations_of_a_row_have_the_same_bits_beside_any_number_of_rows(ours, theirs, width: int) -> None:
    """Torch's own do not: the end of a tensor is computed without vector instructions, and rounded otherwise."""
    x = torch.randn(41, width, generator=torch.Generator().manual_seed(6)) * 4
    whole = ours(x)
    # A few roundings to 24 bits, of numbers up to 20.
    torch.testing.assert_close(whole, theirs(x), atol=2e-6, rtol=2e-6)
    for rows in range(1, 41):
        assert torch.equal(ours(x[:rows]), whole[:rows])
    wide = torch.randn(41, width + 13, generator=torch.Generator().manual_seed(7)) * 4
    if ours is not ops.gelu:  # which is given the result of a product, and nothing that lies apart
        assert torch.equal(ours(wide[:, :width]), torch.stack([ours(row[None, :width])[0] for row in wide]))

"""Examples packed into rows: whole, each once an epoch, the rows nearly full, the same rows from any position."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.data.packed import Examples, Packed, best_fit

FILLER = 999


def examples(lengths: list[int], given_tokens: int = 1) -> Examples:
    """Example e of n tokens is e * 100 + 0 ... n - 1; the first `given_tokens` of each are not learned."""
    tokens = np.concatenate([np.arange(n) + 100 * e for e, n in enumerate(lengths)])
    learned = np.concatenate([np.arange(n) >= given_tokens for n in lengths])
    return Examples(tokens, learned, np.concatenate([[0], np.cumsum(lengths)]))


def packed(lengths: list[int], length: int, **options) -> Packed:
    return Packed(examples(lengths), np.arange(len(lengths)), length, FILLER, **options)


def seen(dataset: Packed, rows: range) -> list[int]:
    """The examples in some rows."""
    found = []
    for row in rows:
        sample = dataset[row]
        found += (sample["labels"][sample["loss_mask"] > 0] // 100).unique().tolist()
    return sorted(found)


@given(st.lists(st.integers(1, 50), max_size=200))
def test_bins_hold_everything_once_and_no_more_than_fits(sizes):
    falling = np.array(sorted(sizes, reverse=True), np.int64)
    bins = best_fit(falling, 50)
    assert sorted(position for bin_ in bins for position in bin_) == list(range(len(sizes)))
    assert all(falling[bin_].sum() <= 50 for bin_ in bins)
    # Best fit leaves no two bins that would fit into one.
    rooms = sorted(int(falling[bin_].sum()) for bin_ in bins)
    assert len(rooms) < 2 or rooms[0] + rooms[1] > 50


def test_a_row_has_inputs_labels_positions_and_numbers_of_its_sequences():
    row = packed([4, 3, 4], 9)[0]
    # 3 + 2 + 3 of 9 positions: the last token of an example predicts nothing, the first is not predicted.
    assert row["tokens"].tolist() == [0, 1, 2, 200, 201, 202, 100, 101, FILLER]
    assert row["labels"].tolist() == [1, 2, 3, 201, 202, 203, 101, 102, FILLER]
    assert row["loss_mask"].tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0]
    assert row["seq_idx"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_only_what_is_learned_counts():
    dataset = Packed(examples([5], given_tokens=3), np.array([0]), 4, FILLER)
    assert dataset[0]["loss_mask"].tolist() == [0, 0, 1, 1]


def test_a_long_example_is_cut_at_the_row():
    row = packed([12], 4)[0]
    assert row["tokens"].tolist() == [0, 1, 2, 3] and row["labels"].tolist() == [1, 2, 3, 4]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=60), st.integers(0, 5))
def test_every_epoch_has_every_example_once(lengths, seed):
    dataset = packed(lengths, 20, samples=10_000, seed=seed)
    everything = list(range(len(lengths)))
    for epoch in range(3):
        assert seen(dataset, range(epoch * dataset.rows, (epoch + 1) * dataset.rows)) == everything


def test_rows_depend_on_the_position_alone_and_change_from_epoch_to_epoch():
    lengths = [2 + i % 7 for i in range(90)]
    one, other = (packed(lengths, 16, samples=1000, seed=3) for _ in range(2))
    late = [one[i] for i in (70, 5, 200)]
    assert all(torch.equal(late[k]["tokens"], other[i]["tokens"]) for k, i in ((2, 200), (0, 70), (1, 5)))
    first = {tuple(sorted(seen(one, range(i, i + 1)))) for i in range(one.rows)}
    second = {tuple(sorted(seen(one, range(i, i + 1)))) for i in range(one.rows, 2 * one.rows)}
    assert len(first & second) < one.rows / 2
    assert not torch.equal(one[0]["tokens"], packed(lengths, 16, samples=9, seed=4)[0]["tokens"])


def test_held_out_rows_come_once_in_one_order_or_at_even_distances():
    lengths = [2 + i % 7 for i in range(90)]
    whole = packed(lengths, 16)
    assert len(whole) == whole.rows and seen(whole, range(len(whole))) == list(range(90))
    few = packed(lengths, 16, samples=5)
    assert len(few) == 5
    assert torch.equal(few[4]["tokens"], whole[4 * whole.rows // 5]["tokens"])
    assert len(packed(lengths, 16, samples=500)) == whole.rows
    assert whole[None]["loss_mask"].sum() == 0


@pytest.mark.parametrize("mean", [16, 60])
def test_rows_are_nearly_full(mean):
    lengths = np.random.default_rng(0).geometric(1 / mean, 3000).clip(2, 256).tolist()
    assert packed(lengths, 256).fullness > 0.99

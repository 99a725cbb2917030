"""Fine-tuning examples packed into rows: several to a row, each one whole, the rows nearly full.

Every epoch packs all examples once. Examples of the same length change places from epoch to epoch, and the rows come
in another order; how the rows are made up of lengths stays, so that an epoch always has as many. The row at any
position of a run follows from the seed alone, so a run can go on from anywhere.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

Sample = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Examples:
    """Examples end to end: tokens (N,), which of them are learned (N,), and where each example begins (E + 1,)."""

    tokens: NDArray
    learned: NDArray[np.bool_]
    starts: NDArray[np.int64]


def best_fit(sizes: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return bins of positions in `sizes` (E,), which falls, such that no bin holds more than `capacity`.

    Each size goes to the fullest bin that has room for it, a new one where there is none (best-fit decreasing: at most
    11/9 of the fewest bins possible, in practice rows of many short examples are more than 99 % full).
    """
    assert len(sizes) == 0 or sizes[0] <= capacity
    bins: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = {}  # bins by the room that is left in them
    rooms: list[int] = []  # the keys, in order
    for position, size in enumerate(sizes.tolist()):
        at = bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        else:
            room, chosen = capacity, []
            bins.append(chosen)
        chosen.append(position)
        if left := room - size:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return bins


class Packed(Dataset):
    """Rows of `sequence_length` positions, each with some of the examples and masked positions up to its end.

    A row is a dict: tokens, labels, position_ids (S,) int64, which count from 0 in each example, loss_mask (S,)
    float32, 1 where the label is learned, and seq_idx (S,) int32, which counts the examples of the row.

    For training, `samples` rows in epochs that `seed` shuffles. With `seed` None (held-out data), each example once,
    and if `samples` is less than the rows there are, rows at even distances.
    """

    def __init__(
        self,
        examples: Examples,
        chosen: NDArray[np.int64],
        sequence_length: int,
        filler: int,
        *,
        samples: int | None = None,
        seed: int | None = None,
    ):
        """`chosen` are the examples to take; the tokens of longer ones past sequence_length + 1 are not seen."""
        self._examples, self._length, self._filler, self._seed = examples, sequence_length, filler, seed
        # An example of n tokens has n - 1 to predict.
        sizes = np.minimum(examples.starts[chosen + 1] - examples.starts[chosen] - 1, sequence_length)
        self._chosen = chosen[np.argsort(-sizes, kind="stable")]
        self._sizes = -np.sort(-sizes)
        self._bins = [np.array(bin_) for bin_ in best_fit(self._sizes, sequence_length)]
        self._samples = self.rows if samples is None else samples if seed is not None else min(samples, self.rows)
        self._epoch: tuple[int, NDArray, NDArray] | None = None

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self._bins)

    @property
    def fullness(self) -> float:
        """The share of the positions of an epoch that examples take."""
        return float(self._sizes.sum()) / max(1, self.rows * self._length)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int | None) -> Sample:
        """Return a row; for None one that is masked throughout, to fill up a batch."""
        tokens = np.full(self._length, self._filler, np.int64)
        labels = tokens.copy()
        mask = np.zeros(self._length, np.float32)
        positions = np.arange(self._length)
        seq_idx = np.zeros(self._length, np.int32)
        at = number = 0
        for number, example in enumerate([] if index is None else self._row(index), 1):
            start = self._examples.starts[example]
            end = min(self._examples.starts[example + 1], start + self._length + 1)
            inside = slice(at, at + end - start - 1)
            tokens[inside] = self._examples.tokens[start : end - 1]
            labels[inside] = self._examples.tokens[start + 1 : end]
            mask[inside] = self._examples.learned[start + 1 : end]
            positions[inside] -= at
            seq_idx[inside] = number - 1
            at = inside.stop
        positions[at:] -= at
        seq_idx[at:] = number
        values = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions, "seq_idx": seq_idx}
        return {name: torch.from_numpy(value) for name, value in values.items()}

    def _row(self, index: int) -> NDArray[np.int64]:
        """The examples of a row."""
        if self._seed is None:
            return self._chosen[self._bins[index * self.rows // self._samples]]
        epoch, row = divmod(index, self.rows)
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng([self._seed, epoch])
            order = random.permutation(len(self._sizes))
            # Shuffled, then sorted again: only what is of the same length has changed places.
            order = order[np.argsort(-self._sizes[order], kind="stable")]
            self._epoch = epoch, order, random.permutation(self.rows)
        _, order, rows = self._epoch
        return self._chosen[order[self._bins[rows[row]]]]
